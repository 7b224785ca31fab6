"""Tokens in a stream: several deltas' at once, a forward that raised, a prompt of the whole tower beside blocks'."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.methods.vpt import VPT
from slimtune.testing import batch, output, randomize, tiny

KINDS = {"tower": st.methods.PromptTuning(length=2, head="none"), "deep": VPT(length=3, path="tokens", head="none"),
         "shallow": VPT(length=4, deep=False, head="none"), "late": VPT(length=1, blocks=(2,), head="none"),
         "short": VPT(length=2, blocks=(1,), carry=False, path="tokens", head="none")}


def prompted():
    model = tiny("vit", num_hidden_layers=4).double()
    for seed, (name, method) in enumerate(KINDS.items()):
        randomize(st.attach(model, method, name=name), seed, std=0.5)
    return model, {"pixel_values": batch("vit")["pixel_values"].double()}


@pytest.mark.parametrize("names", [("tower", "deep"), ("deep", "tower"), ("shallow", "late", "tower", "short"),
                                   ("short", "deep", "late"), tuple(KINDS)], ids=" ".join)
def test_several_prompts_stand_side_by_side(names: tuple[str, ...]):
    """Every block sees those that are there; the class token is as in a stream put together by hand."""
    model, inputs = prompted()
    st.activate(model, *names)
    own = output(model, inputs)
    found = {name: d.state() for name, d in st.deltas(model).items()}
    for delta in st.deltas(model).values():
        delta.detach()
    there: dict[str, torch.Tensor] = {}
    h = model.vit.embeddings(inputs["pixel_values"])
    if "tower" in names:
        there["tower"] = found["tower"]["vision.tokens.prompt_tuning.prompt"].expand(3, -1, -1)
    for i, layer in enumerate(model.vit.layers):
        for name in names:
            new = found[name].get(f"vision.{i}.tokens.vpt.prompt")
            if new is not None:
                there[name] = new.expand(3, -1, -1)
            elif name == "short":
                there.pop(name, None)
        lengths = [17, *(p.shape[1] for p in there.values())]
        h, *rest = layer(torch.cat([h, *there.values()], 1)).split(lengths, 1)
        there = dict(zip(there, rest, strict=True))
    torch.testing.assert_close(own, model.classifier(model.vit.layernorm(h)[:, 0]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("names", [("tower", "deep"), ("shallow", "late"), tuple(KINDS)], ids=" ".join)
def test_a_forward_that_raised_leaves_no_token_behind(names: tuple[str, ...]):
    model, inputs = prompted()
    st.activate(model, *names)
    own = output(model, inputs)
    handle = model.vit.layers[2].mlp.register_forward_hook(lambda m, a, y: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model, inputs)
    handle.remove()
    assert torch.equal(output(model, inputs), own)


@pytest.mark.parametrize("names", [("deep",), ("late",), ()], ids=" ".join)
def test_a_forward_that_raised_in_a_window_leaves_no_token_behind(names: tuple[str, ...]):
    """Not for the same prompt, for another's whose first attention is a later one, nor for none."""
    model, inputs = tiny("swin").double(), {"pixel_values": batch("swin")["pixel_values"].double()}
    for name, blocks in (("deep", None), ("late", (2,))):
        randomize(st.attach(model, VPT(length=3, blocks=blocks, path="tokens", head="none"), name=name), std=0.5)
    st.activate(model, *names)
    own = output(model, inputs)
    st.activate(model, "deep")
    query = model.swin.encoder.layers[0].blocks[1].attention.q_proj
    handle = query.register_forward_hook(lambda m, a, y: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model, inputs)
    handle.remove()
    st.activate(model, *names)
    assert torch.equal(output(model, inputs), own)


@pytest.mark.parametrize("names", [("read", "other"), ("other", "read")], ids=" ".join)
def test_a_prompt_that_the_head_reads_stays_where_anothers_is_taken_off(names: tuple[str, ...]):
    model, inputs = tiny("vit").double(), {"pixel_values": batch("vit")["pixel_values"].double()}
    kinds = {"read": VPT(length=3, deep=False, pool="prompt", head="none"),
             "other": VPT(length=2, path="tokens", head="none")}
    for seed, (name, method) in enumerate(kinds.items()):
        randomize(st.attach(model, method, name=name), seed, std=0.5)
    st.activate(model, *names)
    own = output(model, inputs)
    found = {name: d.state() for name, d in st.deltas(model).items()}
    for delta in st.deltas(model).values():
        delta.detach()
    h = model.vit.embeddings(inputs["pixel_values"])
    p = found["read"]["vision.0.tokens.vpt.prompt"].expand(3, -1, -1)
    for i, layer in enumerate(model.vit.layers):
        other = found["other"][f"vision.{i}.tokens.vpt.prompt"].expand(3, -1, -1)
        h, p, _ = layer(torch.cat([h, p, other], 1)).split([17, 3, 2], 1)
    torch.testing.assert_close(own, model.classifier(model.vit.layernorm(p).mean(1)), atol=1e-12, rtol=1e-12)


def test_a_mean_of_no_prompt_is_refused():
    model = tiny("vit")
    st.attach(model, VPT(length=3, pool="prompt"))
    with pytest.raises(MethodError, match="no prompt to read"):
        model.vit.layernorm(torch.zeros(3, 17, 32))  # by itself, without the blocks


def test_a_mask_of_another_kind_is_refused():
    model, inputs = tiny("vit"), {"pixel_values": batch("vit")["pixel_values"]}
    st.attach(model, VPT(length=3, deep=False))
    h = model.vit.embeddings(**inputs)
    with pytest.raises(MethodError, match="two or four axes"):
        model.vit.layers[0](h, torch.ones(3, 17, 17, dtype=torch.bool))


def test_a_blocks_input_by_name():
    found = []
    for by_name in (False, True):
        model, mask = tiny("vit"), torch.ones(3, 1, 17, 17, dtype=torch.bool)
        st.attach(model, VPT(length=3, deep=False))
        h, block = model.vit.embeddings(batch("vit")["pixel_values"]), model.vit.layers[0]
        found.append(block(hidden_states=h, attention_mask=mask) if by_name else block(h, mask))
    assert found[0].shape == (3, 20, 32)
    assert torch.equal(*found)
