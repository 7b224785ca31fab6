"""VPT on Swin, image by image and window by window in plain torch."""
import pytest
import torch
import torch.nn.functional as F
from vpt_cases import EXACT, assert_same, by_block, images, run

import slimtune as st
from slimtune.errors import MethodError
from slimtune.methods.vpt import VPT
from slimtune.testing import output, randomize, tiny


def attended(block, own, prompts, heads, shift):
    """W-MSA with prompts, image by image and window by window: what it makes of both. own (B, H, W, d)."""
    a, (size, side), total = block.attention, (4, own.shape[1]), prompts.shape[1]
    region = (torch.arange(side) >= side - 4).long() + (torch.arange(side) >= side - shift).long() if shift else (
        torch.zeros(side, dtype=torch.long))
    region = region[:, None] * 3 + region[None]
    bias = F.pad(a.relative_position_bias()[0], (total, 0, total, 0))
    out, made = torch.zeros_like(own), torch.zeros_like(prompts)
    rolled = own.roll((-shift, -shift), (1, 2))
    for b in range(len(own)):
        for i in range(0, side, size):
            for j in range(0, side, size):
                x = torch.cat([prompts[b], rolled[b, i:i + size, j:j + size].flatten(0, 1)])
                here = region[i:i + size, j:j + size].flatten()
                closed = F.pad((here[:, None] != here[None]).double() * -100.0, (total, 0, total, 0))
                q, k, v = (p(x).unflatten(1, (heads, -1)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
                scores = (q @ k.mT / q.shape[-1]**0.5 + bias + closed).softmax(-1)
                y = a.o_proj((scores @ v).transpose(0, 1).flatten(1))
                made[b] += y[:total] / (side // size)**2
                out[b, i:i + size, j:j + size] = y[total:].unflatten(0, (size, size))
    return out.roll((shift, shift), (1, 2)), made


def swin(model, x, prompts, carry):
    h, (height, width) = model.swin.embeddings(x)
    p, number = None, 0
    for stage, heads in zip(model.swin.encoder.layers, (2, 4), strict=True):
        p = None
        for i, block in enumerate(stage.blocks):
            p = prompts[number].expand(len(x), -1, -1) if number in prompts else p if carry else None
            p = h.new_zeros(len(x), 0, h.shape[2]) if p is None else p
            own = block.layernorm_before(h).unflatten(1, (height, width))
            y, made = attended(block, own, block.layernorm_before(p), heads, 2 if i % 2 and height > 4 else 0)
            h, p = h + y.flatten(1, 2), p + made
            h, p = (t + block.mlp(block.layernorm_after(t)) for t in (h, p))
            number += 1
        if stage.downsample is not None:
            h, height, width = stage.downsample(h, (height, width)), height // 2, width // 2
    return model.classifier(model.swin.layernorm(h).mean(1))


@pytest.mark.parametrize("settings", [
    {}, {"path": "tokens"}, {"deep": False}, {"blocks": (0,), "carry": False}, {"blocks": (0, 2)}, {"blocks": (1,)},
    {"blocks": (0, 2), "carry": False, "path": "tokens"}, {"project": 3, "dropout": 0.0}], ids=str)
def test_swin(settings):
    """Each window sees its image's prompt, whose windows are averaged; merging and the mean read patches alone."""
    method = VPT(length=3, **settings)

    def formula(model, x, values):
        prompts = by_block(values)
        if method.project:
            prompts = {i: p @ values[f"shared.vpt.project_{d}"].T + values[f"shared.vpt.bias_{d}"]
                       for (i, p), d in zip(prompts.items(), (16, 16, 32), strict=True)}
        return swin(model, x, prompts, method.carry)
    assert_same(tiny("swin").double(), method, images("swin"), formula)


@pytest.mark.parametrize("settings", [{}, {"path": "tokens"}, {"deep": False}], ids=str)
def test_no_image_sees_anothers_prompt(settings):
    """Which the paper's code fails: its windows are laid out image by image, and its prompts window by window."""
    model, inputs = tiny("swin").double(), images("swin")
    delta = randomize(st.attach(model, VPT(length=3, **settings)), std=0.5)
    slots = [slot for _, slot in delta.slots if "prompt" in slot._parameters]
    shared = [slot._parameters["prompt"].detach() for slot in slots]

    def give(factors):
        for slot, p in zip(slots, shared, strict=True):
            slot._parameters["prompt"] = torch.nn.Parameter(p * torch.tensor(factors).double()[:, None, None])
    give([1.0, 2.0, 3.0])
    out = output(model, inputs)
    for i in range(3):
        give([1.0 + i])
        alone = output(model, {"pixel_values": inputs["pixel_values"][i:i + 1]})
        torch.testing.assert_close(alone, out[i:i + 1], **EXACT)
    give([1.0, 2.0, 3.0])
    inputs["pixel_values"][1:] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)).double()
    changed = output(model, inputs)
    torch.testing.assert_close(changed[0], out[0], **EXACT)
    assert not torch.allclose(changed[1:], out[1:])


def test_swin_tokens_under_gradient_checkpointing():
    found, inputs = [], images("swin")
    for reentrant in (None, False):
        model = tiny("swin").double().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(run(model, VPT(length=3, deep=False), inputs))
    torch.testing.assert_close(found[0], found[1], **EXACT)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    st.attach(model, VPT(length=3, deep=False))
    with pytest.raises(MethodError, match="use_reentrant=False"):
        output(model, inputs)
