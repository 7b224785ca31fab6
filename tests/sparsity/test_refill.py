"""Refill: as dense as before, in whole rows, the best ones; and what is empty can be sliced off."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.prune import prune
from slimtune.sparsity.refill import refill, refill_delta
from slimtune.sparsity.tickets import draw_ticket, find_ticket, snapshot
from slimtune.testing import tiny

cases = some.integers(0, 999), some.floats(0, 1)


def drawn(seed, density):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(12, 9, generator=draw) < density, torch.randn(12, 9, generator=draw)


@settings(deadline=None)
@given(*cases, some.sampled_from(["magnitude", "remain"]))
def test_the_best_rows_live_whole(seed, density, by):
    mask, weight = drawn(seed, density)
    new = refill(mask, weight, by=by)
    assert all(bool(r.all()) or not bool(r.any()) for r in new)
    k = int(new.any(1).sum())
    assert k == int(mask.sum()) // 9
    assert abs(float(new.float().mean()) - float(mask.float().mean())) < 1 / 12
    score = [sum((1.0 if by == "remain" else abs(float(weight[i, j]))) for j in range(9) if mask[i, j])
             for i in range(12)]
    inside = [score[i] for i in range(12) if new[i, 0]]
    outside = [score[i] for i in range(12) if not new[i, 0]]
    assert not inside or not outside or min(inside) >= max(outside)


@settings(deadline=None)
@given(*cases, some.floats(0, 1))
def test_refill_plus_and_the_codes_k(seed, density, extra):
    mask, weight = drawn(seed, density)
    exact = int(mask.sum()) / 9
    assert int(refill(mask, weight, extra=extra)[:, 0].sum()) == int(exact + (12 - exact) * extra + 1e-9)
    assert int(refill(mask, weight, compat="official")[:, 0].sum()) == min(int(exact) + 1, 12)


@settings(deadline=None)
@given(*cases)
def test_a_row_that_gains_stays(seed, density):
    mask, weight = drawn(seed, density)
    before = refill(mask, weight)[:, 0]
    for i in before.nonzero().flatten().tolist():
        more = weight.clone()
        more[i] *= 2
        assert refill(mask, more)[i, 0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_ticket_is_refilled_and_rewound(family):
    delta = st.attach(tiny(family), st.methods.Full())
    start = snapshot(delta)
    ticket = find_ticket(delta, lambda delta: None, 2, rate=0.4, on="base", sites=("mlp.up", "mlp.down"))
    with pytest.raises(MethodError, match="in \\[0, 1\\]"):
        refill_delta(delta, extra=2.0)
    masks = refill_delta(delta, sites=("mlp.up",))
    delta.set_masks(masks)
    delta.load_state(start)
    for name, mask in ticket.masks.items():
        new = delta.masks[name]
        if ("intermediate" in name) or ("c_fc" in name):
            rows, old = (new, mask) if family == "bert" else (new.mT, mask.mT)
            assert int(rows[:, 0].sum()) == int(old.sum()) // 32
            assert torch.equal(delta.state()[name], start[name] * new)
        else:
            assert torch.equal(new, mask)
    draw_ticket(delta, ticket, ticket.start)
    assert all(torch.equal(delta.state()[n], start[n] * m) for n, m in ticket.masks.items())


def test_empty_channels_are_sliced_off_with_what_reads_them():
    """W_down act(W_up x + b), of rows without bias: act(0) = 0, so they and their columns of W_down are nothing."""
    delta = st.attach(tiny("bert").double(), st.methods.Full())
    prune(delta, 0.6, on="base", sites=("mlp.up",))
    delta.set_masks(refill_delta(delta, sites=("mlp.up",)))
    layer = delta.model.bert.encoder.layer[0]
    up, down, x = layer.intermediate.dense, layer.output.dense, torch.randn(5, 32, dtype=torch.float64)
    keep = up.weight.any(1)
    assert 0 < int(keep.sum()) < 64
    whole = F.linear(F.gelu(F.linear(x, up.weight, up.bias * keep)), down.weight, down.bias)
    small = F.linear(F.gelu(F.linear(x, up.weight[keep], up.bias[keep])), down.weight[:, keep], down.bias)
    torch.testing.assert_close(small, whole)


def test_there_must_be_a_mask():
    with pytest.raises(MethodError, match="no mask to refill"):
        refill_delta(st.attach(tiny("bert"), st.methods.Full()))


def test_gates_have_no_rows():
    delta = st.attach(tiny("bert"), st.methods.Gates())
    prune(delta, 0.3, on="gates")
    with pytest.raises(MethodError, match="no rows"):
        refill_delta(delta, on="gates")
