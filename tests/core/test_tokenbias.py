"""Extra tokens, and extra keys and values, beside BEiT's position bias: the whole tower in plain torch."""
import pytest
import torch
from torch.nn.functional import gelu

import slimtune as st
from slimtune.testing import batch, output, randomize, tiny

BIASES = {"blocks": {"use_relative_position_bias": True},
          "shared": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}}


def model_of(biases: str, implementation: str):
    model = tiny("beit", **BIASES[biases]).double()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias_table" in name:
                p.copy_(torch.linspace(-2, 2, p.numel()).view(p.shape))
    return model


def attend(layer, x, bias, keys, values):
    """One attention, head by head; keys and values of the prefix are (l, d)."""
    own, heads = layer.attention, []
    q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        scores = torch.cat([q[..., part] @ keys[:, part].T, q[..., part] @ k[..., part].mT + bias[h] * 8**0.5], -1)
        pairs = torch.cat([values[:, part].expand(len(x), -1, -1), v[..., part]], 1)
        heads.append((scores / 8**0.5).softmax(-1) @ pairs)
    return own.o_proj(torch.cat(heads, -1))


def tower(model, pixels, biases: str, prompt, pairs):
    """The logits; prompt (l, d) behind the class token, pairs: (keys, values) of each block."""
    base = model.beit
    x = base.embeddings(pixels)
    x = torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1:]], 1)
    kept = [0, *range(1 + len(prompt), x.shape[1])]
    for layer, (keys, values) in zip(base.layers, pairs, strict=True):
        table = base.shared_position_bias if biases == "shared" else layer.relative_position_bias
        bias = torch.zeros(4, x.shape[1], x.shape[1], dtype=x.dtype)
        for i, row in enumerate(kept):
            bias[:, row, kept] = table.forward((4, 4))[0, :, i]
        x = x + layer.lambda_1 * attend(layer, layer.layernorm_before(x), bias, keys, values)
        x = x + layer.lambda_2 * layer.mlp.fc2(gelu(layer.mlp.fc1(layer.layernorm_after(x))))
    return model.classifier(base.pooler.layernorm(x[:, kept[1:]].mean(1)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("biases", list(BIASES))
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_is_added_has_a_bias_of_zero(method: str, biases: str, implementation: str):
    model, inputs = model_of(biases, implementation), batch("beit", labels=False)
    pixels, none = inputs["pixel_values"].double(), torch.zeros(0, 32, dtype=torch.double)
    exact = {"atol": 1e-12, "rtol": 0} if implementation == "sdpa" else {"atol": 1e-6, "rtol": 0}  # softmax in float32
    torch.testing.assert_close(output(model, {"pixel_values": pixels}),
                               tower(model, pixels, biases, none, [(none, none)] * 2), **exact)
    cls = st.methods.PromptTuning if method == "prompt" else st.methods.PrefixTuning
    delta = randomize(st.attach(model, cls(length=3, head="none")))
    p = list(delta.parameters())
    prompt, pairs = (p[0], [(none, none)] * 2) if method == "prompt" else (none, [(p[0], p[1]), (p[2], p[3])])
    own = output(model, {"pixel_values": pixels})
    with delta.disabled():
        wanted = tower(model, pixels, biases, prompt, pairs)
    torch.testing.assert_close(own, wanted, **exact)
    for found, right in zip(*(torch.autograd.grad(t.square().sum(), p) for t in (own, wanted)), strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(found, right, **exact)
    resized = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    torch.testing.assert_close(output(model, resized), own)
