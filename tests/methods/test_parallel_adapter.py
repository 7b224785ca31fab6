"""The parallel adapter against its paper: y + W_up ReLU(W_down x), x what enters the feed-forward network."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, batch, doubled, output, randomize, site_io, tiny


def f(p, x):
    return F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.mlp"), ("gpt2", "decoder.0.mlp"), ("t5", "encoder.1.mlp")])
def test_equation(family: str, site: str):
    p, x, y, out = site_io(st.attach(tiny(family).double(), st.methods.ParallelAdapter(bottleneck=5)), site)
    assert_equation(out, y + f(p, x), p)


@pytest.mark.parametrize(("family", "path", "inner"), [
    ("bert", "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dropout"),
    ("gpt2", "transformer.h.1.mlp", "transformer.h.1.mlp"),
    ("t5", "encoder.block.1.layer.1.DenseReluDense", "encoder.block.1.layer.1.DenseReluDense")])
def test_placement(family: str, path: str, inner: str):
    """x is the input of the feed-forward network, y its output: seen by plain hooks on the backbone."""
    model, seen = tiny(family).double(), {}
    tower = "decoder" if family == "gpt2" else "encoder"
    delta = st.attach(model, st.methods.ParallelAdapter(bottleneck=5, blocks=(1,), sites=(f"{tower}.mlp",)))
    model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach().clone()))
    _, x, _, out = site_io(delta, f"{tower}.1.mlp")
    model.get_submodule(inner).register_forward_hook(lambda m, a, y: seen.update(out=y.detach().clone()))
    output(model, batch(family))
    torch.testing.assert_close(x, seen["x"])
    torch.testing.assert_close(out.detach(), seen["out"])


def test_an_attention_adapter_reads_the_attentions_input():
    model = tiny("vit").double()
    inputs = doubled(batch("vit"))
    delta = randomize(st.attach(model, st.methods.ParallelAdapter(bottleneck=5, sites=("attn",), head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    for i, layer in enumerate(model.vit.layers):
        p = {n: state[f"vision.{i}.attn.parallel_adapter.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
        layer.attention.register_forward_hook(
            lambda m, a, k, y, p=p: (y[0] + f(p, a[0] if a else k["hidden_states"]), *y[1:]), with_kwargs=True)
    torch.testing.assert_close(output(model, inputs), own)
