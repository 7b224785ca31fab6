"""The PHM-adapter against its paper: W = sum_i A_i (x) B_i, full B_i, and A_i of every projection's own."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, site_io, tiny

PHMAdapter = st.methods.PHMAdapter


@pytest.mark.parametrize(("family", "site"), [
    ("t5", "decoder.1.mlp"), ("bert", "encoder.1.attn"), ("gpt2", "decoder.1.mlp")])
def test_equation(family: str, site: str):
    method = PHMAdapter(bottleneck=8, division=4)
    p, _, y, out = site_io(st.attach(tiny(family).double(), method), site)
    down, up = (sum(torch.kron(p[f"{n}_A"][i], p[f"{n}_B"][i]) for i in range(4)) for n in ("down", "up"))
    assert_equation(out, y + F.gelu(y @ down + p["down_bias"], approximate="tanh") @ up + p["up_bias"], p)


def test_what_it_trains():
    """Nothing is shared, and nothing stands behind T5's cross-attention."""
    delta = st.attach(tiny("t5"), PHMAdapter(bottleneck=8, division=2))
    names = [n for n in delta.state() if not n.startswith("own")]
    assert not any(n.startswith("shared") or "cross" in n for n in names)
    assert sum(n.endswith("_A") for n in names) == 2 * 8
    assert delta.count().adapter == 8 * (2 * (2**3 + 32 * 8 // 2) + 32 + 8)


def test_the_start():
    state = st.attach(tiny("bert", hidden_size=64), PHMAdapter(bottleneck=16, division=16)).state()
    assert 0.009 < state["encoder.0.attn.phm_adapter.down_A"].std() < 0.011
    bound = (2 * 6 / (64 / 16 + 16 / 16))**0.5
    assert 0.8 * bound < state["encoder.0.attn.phm_adapter.down_B"].abs().max() <= bound


def test_a_division_must_divide():
    with pytest.raises(MethodError, match=r"(?s)division=12 .* Choose a division of 1 2 4 8, or another bottleneck"):
        st.attach(tiny("bert"), PHMAdapter())
