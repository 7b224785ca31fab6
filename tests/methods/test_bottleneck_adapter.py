"""Any point of the unified view: where u comes from, the scale, the activation, and the layer norm's place."""
import itertools

import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny

BottleneckAdapter = st.methods.BottleneckAdapter
ACT = {"relu": torch.relu, "gelu": F.gelu, "gelu_new": lambda t: 0.5 * t * (1 + torch.tanh(
    (2 / torch.pi)**0.5 * (t + 0.044715 * t**3))), "silu": lambda t: t / (1 + torch.exp(-t)),
    "quick_gelu": lambda t: t / (1 + torch.exp(-1.702 * t)), "tanh": torch.tanh, "identity": lambda t: t}


def f(p, u, act="relu"):
    return ACT[act](u @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def norm(p, t):
    centred = t - t.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["ln"] + p["ln_bias"]


@pytest.mark.parametrize(("form", "where", "learned"), itertools.product(
    ("sequential", "parallel"), ("none", "in", "out"), (False, True)))
def test_equation(form: str, where: str, learned: bool):
    """The norm stands before the bottleneck, or behind the scale."""
    method = BottleneckAdapter(bottleneck=5, form=form, layer_norm=where, scale=3.0, learned_scale=learned)
    p, x, y, out = site_io(st.attach(tiny("gpt2").double(), method), "decoder.1.mlp")
    u = y if form == "sequential" else x
    update = 3.0 * (p["gain"] if learned else 1.0) * f(p, norm(p, u) if where == "in" else u)
    assert_equation(out, y + (norm(p, update) if where == "out" else update), p)


@pytest.mark.parametrize("act", sorted(ACT))
def test_activations(act: str):
    method = BottleneckAdapter(bottleneck=5, activation=act)
    p, _, y, out = site_io(st.attach(tiny("bert").double(), method), "encoder.1.mlp")
    assert_equation(out, y + f(p, y, act), p)


def test_every_activation_is_tested():
    with pytest.raises(MethodError, match="activation") as error:
        BottleneckAdapter(activation="swish")
    assert all(f"'{act}'" in str(error.value) for act in ACT)
    assert str(error.value).split("\n")[0].count("'") // 2 == len(ACT) + 1  # and the wrong one


@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize(("family", "attention", "query", "out"), [
    ("bert", "bert.encoder.layer.1.attention", "self.query", "output.dropout"),
    ("t5", "encoder.block.1.layer.0.SelfAttention", "q", "o")])
def test_at_attention(family: str, attention: str, query: str, out: str, form: str):
    """Sequential reads the attention's output, parallel its input, and both add before the residual sum."""
    model, seen, behind = tiny(family).double(), {}, f"{attention}.{out}"
    model.get_submodule(f"{attention}.{query}").register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach()))
    model.get_submodule(behind).register_forward_hook(lambda m, a, y: seen.update(y=y.detach().clone()))
    delta = randomize(st.attach(model, BottleneckAdapter(bottleneck=5, form=form, sites=("encoder.self.attn",))))
    model.get_submodule(behind).register_forward_hook(lambda m, a, out: seen.update(out=out.detach()))
    output(model, batch(family))
    p = {n: delta.state()[f"encoder.1.attn.bottleneck_adapter.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
    torch.testing.assert_close(seen["out"], seen["y"] + f(p, seen["x" if form == "parallel" else "y"]))


@pytest.mark.parametrize(("init", "std"), [("bert", 0.02), ("houlsby", 0.0088), ("small", 0.01)])
def test_the_starts(init: str, std: float):
    state = st.attach(tiny("bert"), BottleneckAdapter(init=init)).state()
    for name in ("down", "up"):
        assert 0.93 * std < state[f"encoder.1.mlp.bottleneck_adapter.{name}"].std() < 1.07 * std
        assert not state[f"encoder.1.mlp.bottleneck_adapter.{name}_bias"].any()


@pytest.mark.parametrize("where", ["none", "in", "out"])
def test_loras_start_is_an_identity_and_says_what_rests(where: str):
    model, inputs = tiny("bert"), batch("bert")
    before = output(model, inputs)
    method = BottleneckAdapter(init="lora", layer_norm=where, learned_scale=True, head="none")
    delta = st.attach(model, method)
    assert method.starts_as_identity()
    assert torch.equal(output(model, inputs), before)
    output(model, inputs).square().sum().backward()
    still = {n for n, p in delta.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= set(delta.resting())
    assert any(n.endswith((".up", ".up_bias")) for n, _ in delta.named_parameters() if n not in still)


def test_dropout_is_inside_the_bottleneck():
    """With p near 1 hardly anything of the bottleneck is left, and only in training: W_up's bias always is."""
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, BottleneckAdapter(bottleneck=5, dropout=1 - 1e-12)))
    quiet = output(model, inputs)
    with torch.no_grad():
        trained = output(model.train(), inputs)
        for n, p in delta.named_parameters():
            if n.endswith(".up"):
                p.zero_()
    torch.testing.assert_close(trained, output(model.eval(), inputs))
    assert not torch.allclose(trained, quiet)
