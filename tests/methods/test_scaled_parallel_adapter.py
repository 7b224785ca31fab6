"""The scaled parallel adapter against its paper: y + s (W_up ReLU(W_down x)), s fixed or learned."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, site_io, tiny


def f(p, x):
    return F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.mlp"), ("gpt2", "decoder.0.mlp"), ("bart", "decoder.1.mlp")])
def test_equation(family: str, site: str):
    method = st.methods.ScaledParallelAdapter(bottleneck=5, scale=3.0)
    p, x, y, out = site_io(st.attach(tiny(family).double(), method), site)
    assert_equation(out, y + 3.0 * f(p, x), p)


def test_a_learned_scale_starts_at_s_and_is_trained():
    method = st.methods.ScaledParallelAdapter(bottleneck=5, scale=3.0, learned_scale=True)
    delta = st.attach(tiny("bert").double(), method)
    assert torch.equal(delta.state()["encoder.0.mlp.scaled_parallel_adapter.gain"], torch.ones((), dtype=torch.float64))
    p, x, y, out = site_io(delta, "encoder.0.mlp")
    assert_equation(out, y + 3.0 * p["gain"] * f(p, x), p)


def test_the_start_is_loras():
    state = st.attach(tiny("bert"), st.methods.ScaledParallelAdapter(bottleneck=5)).state()
    down, up = (state[f"encoder.0.mlp.scaled_parallel_adapter.{n}"] for n in ("down", "up"))
    assert not up.any()
    assert 0 < down.abs().max() <= 32**-0.5
