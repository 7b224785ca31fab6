"""Tickets against the algorithm by hand; the control; and the five arms of one architecture."""
import pytest
import torch

import slimtune as st
from slimtune.core.bits import pack
from slimtune.errors import MethodError
from slimtune.sparsity.prune import prune
from slimtune.sparsity.rethinking import ARMS, compare, scratch_b
from slimtune.sparsity.tickets import draw_ticket, find_ticket, first_values, initialise, snapshot
from slimtune.testing import batch, tiny

M = st.methods


def sgd(delta, steps=2, lr=0.05):
    """Some training, the same for the same values."""
    optimizer = torch.optim.SGD(delta.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        delta.model(**batch("bert")).loss.backward()
        for n, m in delta.masks.items():
            if n in delta.state() and (p := delta.tensors()[n]).grad is not None:
                p.grad *= m
        optimizer.step()


@pytest.mark.parametrize("rewind", ["weights", "rate", "finetune"])
def test_the_algorithm(rewind):
    """In plain tensors: global magnitude, 20 % of what lives a round, kept weights back at theta_i."""
    delta = st.attach(tiny("bert"), M.Full())
    sgd(delta, 1)
    start = snapshot(delta)  # an early step, not the first
    told = []
    slow = st.attach(tiny("bert"), M.Full())
    slow.load_state(start)

    def train(delta, lr=0.05):
        told.append(lr)
        sgd(delta, lr=lr)

    options = {"finetune": lambda delta: train(delta, 0.01)} if rewind == "finetune" else {}
    ticket = find_ticket(delta, train, 3, start=start, rewind=rewind, on="base", **options)
    assert told == [0.05, *([0.01] * 2 if rewind == "finetune" else [0.05] * 2)]
    names = list(ticket.masks)
    alive = torch.ones(16384, dtype=torch.bool)
    for k in range(3):
        sgd(slow, lr=told[k])
        trained = {n: v.clone() for n, v in slow.state().items()}
        size = torch.cat([trained[n].flatten() for n in names]).abs().masked_fill(~alive, -1)
        gone = size.argsort(stable=True)[:int(16384 * (1 - 0.8 ** (k + 1)))]
        alive = torch.ones_like(alive).index_fill(0, gone, False)
        parts = alive.split([start[n].numel() for n in names])
        slow.set_masks({n: p.view_as(start[n]) for n, p in zip(names, parts, strict=True)})
        if rewind == "weights":
            slow.load_state(start)
    assert all(torch.equal(ticket.masks[n], slow.masks[n]) for n in names)
    assert all(torch.equal(v, slow.state()[n]) for n, v in delta.state().items())
    assert all(torch.equal(ticket.trained[n], trained[n]) for n in trained)
    if rewind == "weights":
        assert all(torch.equal(delta.state()[n], v * ticket.masks.get(n, 1)) for n, v in start.items())


def test_densities():
    delta = st.attach(tiny("bert"), M.Full())
    ticket = find_ticket(delta, lambda delta: None, 10, on="base")
    assert [1 - found.sparsity for found in ticket.rounds] == pytest.approx([0.8 ** k for k in range(1, 11)], abs=1e-4)
    assert [entry["kept"] for entry in delta.info["sparsity"]] == [found.kept for found in ticket.rounds]


def test_what_makes_no_sense():
    delta = st.attach(tiny("bert"), M.Pfeiffer(bottleneck=4))
    for options in ({"rounds": 0}, {"rounds": 1, "rate": 1.0}, {"rounds": 1, "rewind": "finetune"}):
        with pytest.raises(MethodError, match="find_ticket"):
            find_ticket(delta, sgd, **options)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit"])
def test_first_values_are_those_of_the_architecture(family):
    model = tiny(family)
    delta = st.attach(model, M.Full())
    one, same, other = (first_values(delta, seed) for seed in (1, 1, 2))
    assert one.keys() == delta.state().keys()
    assert all(torch.equal(v, same[n]) for n, v in one.items())
    with torch.random.fork_rng():
        torch.manual_seed(9)
        by_config = dict(type(model)(model.config).named_parameters())
    for name, value in one.items():
        peer = by_config[name.partition(".")[2]].detach()
        if value.dim() > 1 and peer.any():
            assert not torch.equal(value, other[name])
            assert not torch.equal(value, delta.state()[name])
            assert value.std() / peer.std() == pytest.approx(1, abs=0.35), name
        elif value.dim() == 1:
            assert torch.equal(value, peer), name  # 0 for biases, 1 for norms
    assert list(st.core.deltas(model)) == ["default"]


def test_first_values_of_a_method():
    delta = st.attach(tiny("bert"), M.LoRA(rank=2), "a", seed=4)
    again = first_values(delta, 4)
    lora = [n for n in again if not n.startswith("head")]
    assert all(torch.equal(again[n], delta.state()[n]) for n in lora)
    assert not torch.equal(first_values(delta, 5)[lora[0]], again[lora[0]])
    model = torch.nn.Linear(2, 2)
    model.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(MethodError, match="how scale is initialised"):
        initialise(model)


@pytest.mark.parametrize("structured", [False, True])
def test_five_arms_of_one_architecture(structured):
    method = [M.Full(), M.Gates()] if structured else M.Full()
    delta = st.attach(tiny("bert"), method)
    start = snapshot(delta)
    sgd(delta)
    options = {"on": "gates", "by": "weights"} if structured else {"on": "base"}
    ticket = find_ticket(delta, sgd, 1, rate=0.5, start=start, **options)
    seen = []

    def train(delta, epochs):
        seen.append((snapshot(delta), dict(delta.masks)))
        sgd(delta, 1)
        return epochs

    found = compare(delta, ticket, train, epochs=10, finetune_epochs=3, dense=3.0, pruned=2.0)
    assert list(found) == list(ARMS)
    assert {arm: o.result for arm, o in found.items()} == {arm: o.epochs for arm, o in found.items()} == {
        "finetune": 3, "scratch_E": 10, "scratch_B": 15, "lottery": 10, "random_reinit": 10}
    assert len({o.architecture for o in found.values()}) == 1
    assert len({o.start for o in found.values()}) == 5
    for values, masks in seen:
        assert all(pack(masks[n]).equal(pack(m)) for n, m in ticket.masks.items())
        assert all(not values[n][~m].any() for n, m in masks.items())
    lottery = dict(zip(ARMS, seen, strict=True))["lottery"][0]
    assert all(torch.equal(v, start[n] * ticket.masks.get(n, 1)) for n, v in lottery.items())
    again = compare(delta, ticket, train, epochs=10, finetune_epochs=3, dense=3.0, pruned=2.0, arms=ARMS[:2])
    assert {arm: (o.architecture, o.start) for arm, o in again.items()} == {
        arm: (found[arm].architecture, found[arm].start) for arm in ARMS[:2]}


def test_arms_that_are_none():
    delta = st.attach(tiny("bert"), M.Full())
    ticket = find_ticket(delta, lambda delta: None, 1, on="base")  # never trained: fine-tuning is the lottery
    with pytest.raises(MethodError, match="finetune and lottery begin alike"):
        compare(delta, ticket, lambda *_: None, epochs=1, finetune_epochs=1, dense=1, pruned=1,
                arms=("finetune", "lottery"))
    with pytest.raises(MethodError, match="no arm is named"):
        compare(delta, ticket, lambda *_: None, epochs=1, finetune_epochs=1, dense=1, pruned=1, arms=("scratch",))


@pytest.mark.parametrize(("dense", "pruned", "epochs"), [
    (313_201_664, 206_146_048, 243), (125_485_696, 90_907_264, 220), (252_887_680, 155_124_352, 260)])
def test_scratch_b(dense, pruned, epochs):
    assert scratch_b(160, dense, pruned) == epochs
    assert 0 <= 160 * dense - epochs * pruned < pruned  # within one epoch of the dense one's compute
    assert scratch_b(160, dense, pruned, cap=180) == 180
    assert scratch_b(90, 0.3, 0.1) == 270


def test_a_ticket_on_other_values():
    delta = st.attach(tiny("bert"), M.Full())
    prune(delta, 0.5, on="base")
    masks, values = dict(delta.masks), first_values(delta, 3)
    fresh = st.attach(tiny("bert"), M.Full())
    draw_ticket(fresh, find_ticket(delta, lambda d: None, 1, rate=0.6, on="base"), values)
    assert all(torch.equal(v, values[n] * fresh.masks.get(n, 1)) for n, v in fresh.state().items())
    assert all((fresh.masks[n] <= m).all() for n, m in masks.items())
