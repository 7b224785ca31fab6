"""Compacter++ against its paper: Compacter's equation, behind the feed-forward network only."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, site_io, tiny

CompacterPlusPlus = st.methods.CompacterPlusPlus


@pytest.mark.parametrize(("family", "site"), [
    ("t5", "encoder.0.mlp"), ("t5", "decoder.0.mlp"), ("bert", "encoder.0.mlp"), ("bart", "decoder.0.mlp")])
def test_equation(family: str, site: str):
    """At the first site of a tower that no other one feeds: of an encoder-decoder, one tower at a time."""
    method = CompacterPlusPlus(bottleneck=8, division=2, sites=(site.replace(".0.", "."),))
    p, _, y, out = site_io(st.attach(tiny(family).double(), method), site)
    down, up = (sum(torch.kron(p["A"][i], p[f"{n}_s"][i] @ p[f"{n}_t"][i]) for i in range(2)) for n in ("down", "up"))
    assert_equation(out, y + F.gelu(y @ down + p["down_bias"], approximate="tanh") @ up + p["up_bias"], p)


def test_what_it_trains():
    delta = st.attach(tiny("t5"), CompacterPlusPlus(bottleneck=8))
    sites = {n.partition(".compacter_plus_plus.")[0] for n in delta.state() if not n.startswith(("shared", "own"))}
    assert sites == {f"{tower}.{i}.mlp" for tower in ("encoder", "decoder") for i in (0, 1)}
    assert (delta.count().adapter, delta.count().norms) == (4 * 3 * (32 + 8) + 4**3, 12 * 32)
