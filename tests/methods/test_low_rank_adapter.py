"""The low-rank adapter against its paper: y + W_up GELU(W_down y), W = s t."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, site_io, tiny

LowRankAdapter = st.methods.LowRankAdapter


@pytest.mark.parametrize(("family", "site"), [
    ("t5", "decoder.1.attn"), ("bert", "encoder.1.mlp"), ("gpt2", "decoder.1.attn")])
@pytest.mark.parametrize("rank", [1, 3])
def test_equation(family: str, site: str, rank: int):
    p, _, y, out = site_io(st.attach(tiny(family).double(), LowRankAdapter(bottleneck=5, rank=rank)), site)
    h = F.gelu(y @ p["down_s"] @ p["down_t"] + p["down_bias"], approximate="tanh")
    assert_equation(out, y + h @ p["up_s"] @ p["up_t"] + p["up_bias"], p)


def test_at_rank_one_the_codes_elementwise_product_is_the_matrix_product():
    p, *_ = site_io(st.attach(tiny("bert").double(), LowRankAdapter(bottleneck=5)), "encoder.0.mlp")
    torch.testing.assert_close(p["down_s"] * p["down_t"], p["down_s"] @ p["down_t"])


def test_what_it_trains_and_where_it_starts():
    delta = st.attach(tiny("t5"), LowRankAdapter(bottleneck=5))
    assert not any("cross" in n for n in delta.state())
    assert (delta.count().adapter, delta.count().norms) == (8 * 3 * (32 + 5), 12 * 32)
    bound = (2 * 6 / (32 + 1))**0.5
    assert 0.8 * bound < delta.state()["encoder.0.attn.low_rank_adapter.down_s"].abs().max() <= bound
