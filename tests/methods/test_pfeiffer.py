"""Pfeiffer against its paper: u = LN(z), out = LN(f(u) + z) behind a post-norm sum; h + f(h) in a pre-norm block."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny


def f(p, u):
    return F.relu(u @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


@pytest.mark.parametrize(("family", "site", "norm"), [
    ("bert", "encoder.1.norm.mlp", "bert.encoder.layer.1.output.LayerNorm"),
    ("distilbert", "encoder.0.norm.mlp", "distilbert.transformer.layer.0.output_layer_norm"),
    ("bart", "decoder.1.norm.mlp", "model.decoder.layers.1.final_layer_norm")])
def test_equation_behind_a_post_norm(family: str, site: str, norm: str):
    model = tiny(family).double()
    p, z, u, out = site_io(st.attach(model, st.methods.Pfeiffer(bottleneck=5)), site)
    ln = model.get_submodule(norm)
    torch.testing.assert_close(u, F.layer_norm(z, (32,), ln.weight, ln.bias, ln.eps))
    assert_equation(out, F.layer_norm(f(p, u) + z, (32,), ln.weight, ln.bias, ln.eps), p)


@pytest.mark.parametrize(("family", "site"), [
    ("gpt2", "decoder.1.mlp"), ("t5", "encoder.0.mlp"), ("vit", "vision.1.mlp")])
def test_equation_in_a_pre_norm_block(family: str, site: str):
    p, _, h, out = site_io(st.attach(tiny(family).double(), st.methods.Pfeiffer(bottleneck=5)), site)
    assert_equation(out, h + f(p, h), p)


def test_placement():
    """On BERT, the adapter in plain hooks around each block's last norm gives the same output."""
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, st.methods.Pfeiffer(bottleneck=5, head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    for i, layer in enumerate(model.bert.encoder.layer):
        p = {n: state[f"encoder.{i}.norm.mlp.pfeiffer.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
        layer.output.LayerNorm.register_forward_hook(lambda ln, z, u, p=p: ln.forward(f(p, u) + z[0]))
    torch.testing.assert_close(output(model, inputs), own)
