"""Houlsby against its paper: a bottleneck with a residual on each sub-layer's output, before the residual sum."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, batch, doubled, output, randomize, site_io, tiny


def adapter(p, h):
    return h + F.gelu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn"), ("bert", "encoder.0.mlp"), ("gpt2", "decoder.1.mlp"), ("t5", "decoder.0.attn")])
def test_equation(family: str, site: str):
    p, _, y, out = site_io(st.attach(tiny(family).double(), st.methods.Houlsby(bottleneck=5)), site)
    assert_equation(out, adapter(p, y), p)


@pytest.mark.parametrize(("family", "places"), [
    ("bert", ("bert.encoder.layer.{}.attention.output.dropout", "bert.encoder.layer.{}.output.dropout")),
    ("gpt2", ("transformer.h.{}.attn.resid_dropout", "transformer.h.{}.mlp.dropout")),
    ("vit", ("vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2"))])
def test_placement(family: str, places: tuple[str, str]):
    """The same model with the equation in plain hooks on the two outputs of each block gives the same output."""
    model, inputs = tiny(family).double(), batch(family)
    inputs = doubled(inputs)
    delta = randomize(st.attach(model, st.methods.Houlsby(bottleneck=5, norms="none", head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    tower = {"bert": "encoder", "gpt2": "decoder", "vit": "vision"}[family]
    for i in range(2):
        for role, place in zip(("attn", "mlp"), places, strict=True):
            p = {n: state[f"{tower}.{i}.{role}.houlsby.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
            model.get_submodule(place.format(i)).register_forward_hook(lambda m, a, out, p=p: adapter(p, out))
    torch.testing.assert_close(output(model, inputs), own)


def test_the_start_is_the_papers_or_the_codes():
    for compat, std in (("paper", 0.01), ("official", 0.001)):
        state = st.attach(tiny("bert"), st.methods.Houlsby(bottleneck=64, compat=compat)).state()
        down = state["encoder.0.attn.houlsby.down"]
        assert 0.7 * std < down.std() < std  # cut at two deviations: 0.88 of it
        assert down.abs().max() <= 2 * std
        assert not state["encoder.0.attn.houlsby.up_bias"].any()
