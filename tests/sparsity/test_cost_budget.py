"""Budget against every subset, and the costs of heads and neurons against the papers' numbers."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.budget import Budget, within
from slimtune.sparsity.prune import prune
from slimtune.sparsity.target import targets
from slimtune.testing import bert_base_meta, tiny

scores = some.lists(some.integers(0, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(scores, scores, some.integers(1, 5), some.integers(1, 5), some.floats(0, 0.99))
def test_two_kinds_are_exact(heads, neurons, head, neuron, sparsity):
    prices = [head] * len(heads) + [neuron] * len(neurons)
    limit = sum(prices) * (1 - sparsity) + 1e-9
    best = max(sum(v for v, m in zip(heads + neurons, kept, strict=True) if m)
               for kept in itertools.product((0, 1), repeat=len(prices))
               if sum(p for p, m in zip(prices, kept, strict=True) if m) <= limit)
    keep = within({"h": torch.tensor(heads, dtype=torch.float32), "n": torch.tensor(neurons, dtype=torch.float32)},
                  {"h": head, "n": neuron}, sparsity)
    chosen = torch.cat([keep["h"], keep["n"]]).tolist()
    assert sum(v for v, m in zip(heads + neurons, chosen, strict=True) if m) == best
    assert sum(p for p, m in zip(prices, chosen, strict=True) if m) <= limit


@settings(deadline=None)
@given(some.lists(scores, min_size=3, max_size=4), some.floats(0, 0.99))
def test_more_kinds_stay_in_the_budget(values, sparsity):
    cost = {str(i): float(i + 1) for i in range(len(values))}
    keep = within({str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}, cost, sparsity)
    spent = sum(int(keep[n].sum()) * cost[n] for n in cost)
    limit = sum(len(v) * cost[str(i)] for i, v in enumerate(values)) * (1 - sparsity)
    assert spent <= limit + 1e-9
    left = [cost[n] for n in cost if not keep[n].all()]
    assert not left or spent + min(left) > limit - 1e-9  # nothing more could be paid for


def test_the_dead_are_not_paid_for():
    keep = within({"h": torch.tensor([-torch.inf, -torch.inf, 1.0]), "n": torch.tensor([-torch.inf, 2.0])},
                  {"h": 3.0, "n": 1.0}, 0.0)
    assert keep["h"].tolist() == [False, False, True]
    assert keep["n"].tolist() == [False, True]


def test_scores_below_0_are_kept_where_they_can_be_paid_for():
    given_scores = {"h": torch.tensor([-1.0, -2.0]), "n": torch.tensor([-0.1, -torch.inf, 0.3])}
    keep = within(given_scores, {"h": 3.0, "n": 1.0}, 0.0)
    assert keep["h"].all()
    assert keep["n"].tolist() == [True, False, True]
    keep = within(given_scores, {"h": 3.0, "n": 1.0}, 0.3)  # 6.3 of 9: the worse head goes
    assert keep["h"].tolist() == [True, False]


def test_costs_of_bert_base():
    delta = st.attach(bert_base_meta(), st.methods.Gates())
    gates = targets(delta, "gates")
    macs = Budget(tokens=128).costs(delta, gates)
    assert {macs[n] for n in macs if "heads" in n} == {27_262_976}
    assert {macs[n] for n in macs if "act" in n} == {196_608}
    assert sum(macs[n] * gates[n].parameter.numel() for n in macs) == 11_173_625_856
    params = Budget(unit="params").costs(delta, gates)
    assert {params[n] for n in params if "heads" in n} == {4 * 768 * 64 + 3 * 64}
    assert {params[n] for n in params if "act" in n} == {2 * 768 + 1}


def best_of_multiples(layers: list[list[int]], heads: list[int], head: int, neuron: int, multiple: int,
                      sparsity: float) -> int:
    """By every subset: the highest sum of scores within the limit, of those that keep multiples of each layer."""
    flat = [*heads, *itertools.chain(*layers)]
    owner = [-1] * len(heads) + [i for i, layer in enumerate(layers) for _ in layer]
    prices = [head if o < 0 else neuron for o in owner]
    limit, best = sum(prices) * (1 - sparsity) + 1e-9, 0
    for kept in itertools.product((0, 1), repeat=len(flat)):
        counts = [sum(m for m, o in zip(kept, owner, strict=True) if o == i) for i in range(len(layers))]
        if sum(p * m for p, m in zip(prices, kept, strict=True)) <= limit and not any(c % multiple for c in counts):
            best = max(best, sum(v * m for v, m in zip(flat, kept, strict=True)))
    return best


few = some.lists(some.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(few, few, few, some.integers(1, 5), some.integers(1, 5), some.integers(1, 4), some.floats(0, 0.99))
def test_multiples_are_exact(heads, one, two, head, neuron, multiple, sparsity):
    given_scores = {n: torch.tensor(v, dtype=torch.float32) for n, v in (("h", heads), ("a", one), ("b", two))}
    keep = within(given_scores, {"h": head, "a": neuron, "b": neuron}, sparsity, {"a": multiple, "b": multiple})
    assert all(int(keep[n].sum()) % multiple == 0 for n in "ab")
    spent = head * int(keep["h"].sum()) + neuron * int(keep["a"].sum() + keep["b"].sum())
    assert spent <= (head * len(heads) + neuron * (len(one) + len(two))) * (1 - sparsity) + 1e-9
    assert sum(int(given_scores[n][m].sum()) for n, m in keep.items()) == best_of_multiples(
        [one, two], heads, head, neuron, multiple, sparsity)


@settings(deadline=None, max_examples=30)
@given(scores, scores, some.floats(0, 0.99))
def test_a_multiple_of_one_is_none(heads, neurons, sparsity):
    given_scores = {"h": torch.tensor(heads).float(), "n": torch.tensor(neurons).float()}
    plain = within(given_scores, {"h": 3, "n": 2}, sparsity)
    assert all(torch.equal(m, plain[n]) for n, m in within(given_scores, {"h": 3, "n": 2}, sparsity, {"n": 1}).items())


def test_multiples_of_what_lives():
    """The dead make no layer's number up, and nothing is kept where too few live."""
    dead = -torch.inf
    keep = within({"a": torch.tensor([1.0, dead, 3.0, 2.0]), "b": torch.tensor([dead, 9.0, dead, dead])},
                  {"a": 1.0, "b": 1.0}, 0.0, {"a": 2, "b": 2})
    assert keep["a"].tolist() == [False, False, True, True]
    assert not keep["b"].any()
    assert not within({"a": torch.full((3,), dead)}, {"a": 1.0}, 0.0)["a"].any()


@pytest.mark.parametrize("family", ["bert", "llama", "swin"])
@pytest.mark.parametrize("unit", ["macs", "params", "latency"])
def test_each_layer_keeps_a_multiple(family: str, unit: str):
    """Within the limit, and what is left over would not pay for another bunch; heads go one by one."""
    delta = st.attach(tiny(family), st.methods.Gates())
    budget = Budget(unit=unit, multiple=12, each={"attn.heads": 7.0, "mlp.act": 0.5} if unit == "latency" else None)
    gates = targets(delta, "gates")
    costs = budget.costs(delta, gates)
    with torch.no_grad():  # as much for its cost, by kind
        for n, gate in gates.items():
            gate.parameter.copy_(torch.linspace(1, 2, gate.parameter.numel()) * costs[n])
    prune(delta, 0.45, on="gates", allocation=budget)
    kept = {n: int(m.sum()) for n, m in delta.masks.items()}
    assert all(number % 12 == 0 for n, number in kept.items() if "act" in n)
    assert any(number > 0 for n, number in kept.items() if "act" in n)
    assert any(0 < number < delta.masks[n].numel() for n, number in kept.items() if "heads" in n)
    limit = 0.55 * sum(m.numel() * costs[n] for n, m in delta.masks.items())
    spent = sum(number * costs[n] for n, number in kept.items())
    assert spent <= limit * (1 + 1e-9)
    more = [12 * costs[n] for n, m in delta.masks.items() if "act" in n and kept[n] + 12 <= m.numel()]
    assert spent + min(more) > limit
    report = st.shrink(delta.model)
    assert all(number % 12 == 0 for number in report.neurons.values())
    allocation = delta.info["sparsity"][-1]["allocation"]
    assert allocation["multiple"] == 12


def test_more_than_a_layer_has():
    delta = st.attach(tiny("bert"), st.methods.Gates())
    with pytest.raises(MethodError, match=r"multiple of 65 neurons a layer, and encoder.0.mlp.act.gates.c has 64"):
        prune(delta, 0.5, "random", on="gates", allocation=Budget(multiple=65))
    assert delta.masks == {}
    assert not [n for n in Budget(multiple=64).multiples(targets(delta, "gates")).values() if n not in (1, 64)]
    for wrong in ({"multiple": 0}, {"unit": "latency", "each": {"mlp.act": 0.0}}):
        with pytest.raises(ValidationError):
            Budget(**wrong)


def test_latency_needs_times():
    delta = st.attach(tiny("bert"), st.methods.Gates())
    with pytest.raises(MethodError, match=r"'attn.heads': \.\.\., 'mlp.act'"):
        prune(delta, 0.5, "random", on="gates", allocation=Budget(unit="latency", each={"mlp.act": 1.0}))
    prune(delta, 0.5, "random", on="gates", allocation=Budget(unit="latency", each={"mlp.act": 1.0, "attn.heads": 9.0}))
    spent = sum(int(m.sum()) * (9.0 if "heads" in n else 1.0) for n, m in delta.masks.items())
    assert 0 < spent <= 0.5 * 2 * (4 * 9 + 64)
