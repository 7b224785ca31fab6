"""The residual stream's norms, number by number, and gated networks beside the same without the dimensions, by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slimtune as st
from slimtune.core.stream import over_living
from slimtune.testing import batch, output, tiny


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """One number after the other; without a bias, the root of the mean square."""
    out = torch.empty_like(x)
    for at in [(i, j) for i in range(x.shape[0]) for j in range(x.shape[1])]:
        values = x[at].tolist()
        mean = sum(values) / len(values) if bias is not None else 0.0
        scale = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
        for k, v in enumerate(values):
            out[at][k] = (v - mean) / scale * weight[k] + (0 if bias is None else bias[k])
    return out


@pytest.mark.parametrize("bias", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dead", [0, 1, 5, 7])
def test_the_norm_of_what_lives(bias: bool, dead: int):
    """Also with coefficients of each example, and with numbers as large as some dimensions of real models have."""
    g = torch.Generator().manual_seed(dead)
    x, w = torch.randn(3, 4, 8, generator=g).double() * 3 + 1, torch.randn(8, generator=g).double()
    b = torch.randn(8, generator=g).double() if bias else None
    c = torch.rand(3, 8, generator=g).double() + 0.5
    for row in c:
        row[torch.randperm(8, generator=g)[:dead]] = 0
    x[..., 3] *= 1000

    def full(t: Tensor) -> Tensor:
        return F.rms_norm(t, (8,), w, 1e-2) if b is None else F.layer_norm(t, (8,), w, b, 1e-2)

    found = over_living(full, bias, b, c, x)
    for i, row in enumerate(c):
        kept = row.nonzero().flatten()
        want = norm(x[i:i + 1, :, kept], w[kept], None if b is None else b[kept], 1e-2) * row[kept]
        torch.testing.assert_close(found[i:i + 1, :, kept], want)
        assert not found[i][:, row == 0].any()
        assert torch.equal(over_living(full, bias, b, row, x)[i], over_living(full, bias, b, row, x[i:i + 1])[0])
    assert torch.equal(over_living(full, bias, b, torch.ones(8).double(), x), full(x))


def attention(x: Tensor, w, heads: int, causal: bool, mask: Tensor | None) -> Tensor:
    """w: (weight, bias) of q, k, v and o."""
    q, k, v = ((x @ m.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for m, b in w[:3])
    score = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        score = score + torch.full(score.shape[-2:], -torch.inf).triu(1)
    if mask is not None:
        score = score.masked_fill(mask[:, None, None] == 0, -torch.inf)
    m, b = w[3]
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ m.T + b


def bert_by_hand(model, kept: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Every matrix and vector cut to what is kept, and plain torch."""
    e = model.bert.embeddings
    x = e.word_embeddings.weight[ids] + e.position_embeddings.weight[: ids.shape[1]] + e.token_type_embeddings.weight[0]

    def ln(m, t):
        return F.layer_norm(t, (len(kept),), m.weight[kept], m.bias[kept], m.eps)

    x = ln(e.LayerNorm, x[..., kept])
    for layer in model.bert.encoder.layer:
        a, o = layer.attention.self, layer.attention.output
        w = [(m.weight[:, kept], m.bias) for m in (a.query, a.key, a.value)]
        w.append((o.dense.weight[kept], o.dense.bias[kept]))
        x = ln(o.LayerNorm, x + attention(x, w, 4, False, mask))
        up, down = layer.intermediate.dense, layer.output.dense
        h = F.gelu(x @ up.weight[:, kept].T + up.bias) @ down.weight[kept].T + down.bias[kept]
        x = ln(layer.output.LayerNorm, x + h)
    pooled = (x[:, 0] @ model.bert.pooler.dense.weight[:, kept].T + model.bert.pooler.dense.bias).tanh()
    return model.classifier(pooled)


def gpt2_by_hand(model, kept: Tensor, ids: Tensor) -> Tensor:
    t = model.transformer
    x = (t.wte.weight[ids] + t.wpe.weight[: ids.shape[1]])[..., kept]

    def ln(m):
        return F.layer_norm(x, (len(kept),), m.weight[kept], m.bias[kept], m.eps)

    for block in t.h:
        c, p = block.attn.c_attn, block.attn.c_proj
        w = [(c.weight[kept, i:i + 32].T, c.bias[i:i + 32]) for i in (0, 32, 64)]
        w.append((p.weight[:, kept].T, p.bias[kept]))
        x = x + attention(ln(block.ln_1), w, 4, True, None)
        up, down = block.mlp.c_fc, block.mlp.c_proj
        x = x + F.gelu(ln(block.ln_2) @ up.weight[kept] + up.bias, approximate="tanh") @ down.weight[:, kept] \
            + down.bias[kept]
    return ln(t.ln_f) @ t.wte.weight[:, kept].T


def vit_by_hand(model, kept: Tensor, pixels: Tensor) -> Tensor:
    v, conv = model.vit, model.vit.embeddings.patch_embeddings.projection
    x = F.conv2d(pixels, conv.weight[kept], conv.bias[kept], stride=4).flatten(2).mT
    x = torch.cat([v.embeddings.cls_token[..., kept].expand(len(x), 1, -1), x], 1)
    x = x + v.embeddings.position_embeddings[..., kept]

    def ln(m):
        return F.layer_norm(x, (len(kept),), m.weight[kept], m.bias[kept], m.eps)

    for layer in v.layers:
        a, mlp = layer.attention, layer.mlp
        w = [(m.weight[:, kept], m.bias) for m in (a.q_proj, a.k_proj, a.v_proj)] + [
            (a.o_proj.weight[kept], a.o_proj.bias[kept])]
        x = x + attention(ln(layer.layernorm_before), w, 4, False, None)
        x = x + F.gelu(ln(layer.layernorm_after) @ mlp.fc1.weight[:, kept].T + mlp.fc1.bias) @ mlp.fc2.weight[kept].T \
            + mlp.fc2.bias[kept]
    return ln(v.layernorm)[:, 0] @ model.classifier.weight[:, kept].T + model.classifier.bias


@torch.no_grad()
@pytest.mark.parametrize(("family", "by_hand"), [("bert", bert_by_hand), ("gpt2", gpt2_by_hand), ("vit", vit_by_hand)])
def test_the_network_written_by_hand(family: str, by_hand):
    model, inputs = tiny(family).double(), batch(family)
    if family == "gpt2":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    args = [v for n, v in inputs.items() if n != "labels" and (family != "gpt2" or n == "input_ids")]
    kept = torch.tensor([0, 3, 4, 9, 10, 11, 17, 20, 22, 23, 24, 30, 31])
    told = by_hand(model, kept, *args)
    plain = by_hand(model, torch.arange(32), *args)
    torch.testing.assert_close(output(model, inputs), plain)
    assert (told - plain).abs().max() > 1e-6
    delta = st.attach(model, st.methods.Gates(sites=(), hidden=True))
    gate = delta.tensors()["shared.gates.hidden"]
    gate.copy_(torch.zeros(32).index_fill(0, kept, 1))
    torch.testing.assert_close(output(model, inputs), told)
    assert st.shrink(model).hidden == {st.dissect(model).towers[0].name: 13}
    torch.testing.assert_close(output(model, inputs), told)
    other = tiny(family).double()
    st.shrink(other, keep={f"{st.dissect(other).towers[0].name}.hidden": kept.tolist()})
    assert torch.equal(output(other, inputs), output(model, inputs))
