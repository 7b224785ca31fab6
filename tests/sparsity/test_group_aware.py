"""Group-aware tickets: the mask of every round made structure, against the algorithm by hand."""
import functools

import pytest
import torch
from test_tickets import sgd

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.refill import refill_delta
from slimtune.sparsity.regroup import filled, regroup, regroup_delta
from slimtune.sparsity.tickets import find_ticket, snapshot
from slimtune.testing import tiny

M = st.methods
SITES = ("mlp.up", "mlp.down")


def rows_of(mask, weight):
    """Refill by hand: int(live / n) rows of the largest sums, whole; of equal ones the later."""
    k, n = int(mask.sum()) // mask.shape[1], mask.shape[0]
    sums = [sum(abs(float(w)) for w, m in zip(weight[i], mask[i], strict=True) if m) for i in range(n)]
    best = sorted(range(n), key=lambda i: (sums[i], i))[n - k:]
    return torch.tensor([[i in best] * mask.shape[1] for i in range(n)])


def blocks_of(mask, weight):
    return filled(regroup(mask, rows=4, columns=4), mask)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("group", "by_hand"), [
    (functools.partial(refill_delta, sites=SITES), rows_of),
    (functools.partial(regroup_delta, sites=SITES, rows=4, columns=4), blocks_of)])
def test_the_algorithm(family, group, by_hand):
    """Global magnitude takes 20 % of what lives in the groups; the groups are of trained values; then theta_i."""
    delta, slow = (st.attach(tiny(family), M.Full()) for _ in range(2))
    start = snapshot(delta)
    train = sgd if family == "bert" else lambda delta: None
    ticket = find_ticket(delta, train, 3, group=group, on="base", sites=SITES)
    names = list(ticket.masks)
    shapes = [start[n].shape for n in names]
    alive, changed = torch.ones(sum(s.numel() for s in shapes), dtype=torch.bool), 0
    for k in range(3):
        train(slow)
        trained = {n: v.clone() for n, v in slow.state().items()}
        size = torch.cat([trained[n].flatten() for n in names]).abs().masked_fill(~alive, -1)
        gone = int(round(len(alive) * (1 - 0.8 * int(alive.sum()) / len(alive)), 6))
        alive = torch.ones_like(alive).index_fill(0, size.argsort(stable=True)[:gone], False)
        parts = [p.view(s) for p, s in zip(alive.split([s.numel() for s in shapes]), shapes, strict=True)]
        turn = (lambda t: t.mT) if family == "gpt2" else (lambda t: t)
        masks = [turn(by_hand(turn(p), turn(trained[n]))) for n, p in zip(names, parts, strict=True)]
        alive = torch.cat([m.flatten() for m in masks])
        changed += sum(int((m ^ p).sum()) for m, p in zip(masks, parts, strict=True))
        slow.set_masks({n: m.contiguous() for n, m in zip(names, masks, strict=True)})
        slow.load_state(start)
        assert ticket.rounds[k].kept == int(alive.sum())
        assert delta.info["sparsity"][k]["kept"] == int(alive.sum())
    assert all(torch.equal(ticket.masks[n], slow.masks[n]) for n in names)
    assert all(torch.equal(v, start[n] * ticket.masks.get(n, 1)) for n, v in delta.state().items())
    assert changed > 0
    assert [r.sparsity for r in ticket.rounds] == sorted(r.sparsity for r in ticket.rounds)


def test_refilled_rows_come_back_to_their_first_values():
    """A row that lost some of its weights has them again, at theta_i."""
    delta = st.attach(tiny("bert"), M.Full())
    start = snapshot(delta)
    ticket = find_ticket(delta, sgd, 2, group=refill_delta, on="base")
    for name, mask in ticket.masks.items():
        assert all(bool(row.all()) or not bool(row.any()) for row in mask)
        assert torch.equal(delta.state()[name], start[name] * mask)
    plain = find_ticket(st.attach(tiny("bert"), M.Full()), sgd, 1, on="base")
    assert any(bool((m & ~plain.masks[n]).any()) for n, m in ticket.masks.items())


def test_what_makes_no_sense():
    delta = st.attach(tiny("bert"), M.Full())
    for rewind, more in (("rate", {}), ("finetune", {"finetune": sgd})):
        with pytest.raises(MethodError, match="has no values of"):
            find_ticket(delta, sgd, 2, group=refill_delta, rewind=rewind, on="base", **more)
    with pytest.raises(MethodError, match="nothing lives in the groups"):
        find_ticket(delta, lambda delta: None, 1, rate=0.99, group=refill_delta, on="base")
    with pytest.raises(MethodError, match="no mask to regroup"):
        regroup_delta(st.attach(tiny("bert"), M.Full()))


def test_without_blocks_the_mask_stays():
    delta = st.attach(tiny("bert"), M.Full())
    find_ticket(delta, lambda delta: None, 1, on="base")
    masks = regroup_delta(delta, rows=64, columns=64)
    assert all(torch.equal(masks[n], m) for n, m in delta.masks.items())
