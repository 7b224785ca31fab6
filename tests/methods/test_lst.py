"""Ladder side-tuning against its paper: the ladder over the frozen hidden states, written as a plain loop."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import batch, output, randomize, tiny


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(p, kind, u, memory, mask, width):
    q, k, v = ((t @ p[f"{kind}_{n}"].T).unflatten(-1, (4, width)).transpose(1, 2)
               for t, n in ((u, "q"), (memory, "k"), (memory, "v")))
    scores = q @ k.mT / width**0.5 + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p[f"{kind}_o"].T


def ladder(p, hidden, mask, width=2):
    """hidden: the input of the first block and the output of each; p(i): the parameters at block i."""
    s = hidden[0] @ p(0)["start"].T + p(0)["start_bias"]
    for i, h in enumerate(hidden[1:]):
        q = p(i)
        mu = torch.sigmoid(q["gate"] / 0.1)
        s = mu * s + (1 - mu) * (h @ q["rung"].T + q["rung_bias"])
        u = rms(s, q["norm_self"])
        s = s + attend(q, "self", u, u, mask, width)
        s = s + F.gelu(rms(s, q["norm_mlp"]) @ q["mlp_up"].T) @ q["mlp_down"].T
    return s


def hidden_states(model, layers, inputs):
    seen = []
    hooks = [layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))]
    hooks += [layer.register_forward_hook(lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y).detach()))
              for layer in layers]
    output(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_equation(family: str):
    model = tiny(family).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(family).items()}
    layers, end, tower = {"bert": (lambda: model.bert.encoder.layer, "bert.encoder.layer.1", "encoder"),
                          "gpt2": (lambda: model.transformer.h, "transformer.ln_f", "decoder"),
                          "vit": (lambda: model.vit.layers, "vit.layernorm", "vision")}[family]
    hidden = hidden_states(model, layers(), inputs)
    delta = randomize(st.attach(model, st.methods.LST(reduction=4, head="none")), std=0.2)
    named = dict(delta.named_parameters())
    seen = {}
    model.get_submodule(end).register_forward_hook(lambda m, a, y: seen.update(out=y[0] if isinstance(y, tuple) else y))
    output(model, inputs)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if "attention_mask" in inputs:
        mask = (1 - inputs["attention_mask"].double())[:, None, None] * -1e9
    if family == "gpt2":
        mask = mask + torch.full((7, 7), -1e9, dtype=torch.float64).triu(1)
    site = {n: t for n, t in named.items() if ".block.lst." in n}
    p = [{n.rpartition(".")[2]: t for n, t in site.items() if n.startswith(f"{tower}.{i}.")} for i in range(2)]
    top = {n.rpartition(".")[2]: t for n, t in named.items() if ".top.lst." in n}
    wanted = rms(ladder(lambda i: p[i], hidden, mask), top["norm_top"]) @ top["top"].T + top["top_bias"]
    st.testing.assert_equation(seen["out"], wanted, {**site, **{n: t for n, t in named.items() if ".top.lst." in n}})


def test_the_backbone_keeps_no_graph():
    model, grads = tiny("bert"), []
    st.attach(model, st.methods.LST(reduction=4))
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda m, a, y: grads.append(y.requires_grad))
    output(model, batch("bert"))
    assert grads == [False, False]


def test_the_gate_starts_half_open():
    state = st.attach(tiny("bert"), st.methods.LST(reduction=4)).state()
    assert state["encoder.0.block.lst.gate"] == 0


def test_count():
    """The formula of the docstring: w = d / r, f = d_ff / r, i = heads (head_dim / r)."""
    d, w, f, i = 32, 8, 16, 4 * 2
    start, block = (d + 1) * w, (d + 1) * w + 1 + 4 * w * i + 2 * w * f + 2 * w
    cross, top = 4 * w * i + w, w + (w + 1) * d
    assert st.attach(tiny("bert"), st.methods.LST(reduction=4)).count().adapter == start + 2 * block + top
    both = 2 * (start + 2 * block) + 2 * cross + w + top  # the encoder's end is a norm alone
    assert st.attach(tiny("t5"), st.methods.LST(reduction=4)).count().adapter == both
