"""Budget against every subset, and the costs of heads and neurons against the papers' numbers."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

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


def test_latency_needs_times():
    delta = st.attach(tiny("bert"), st.methods.Gates())
    with pytest.raises(MethodError, match=r"'attn.heads': \.\.\., 'mlp.act'"):
        prune(delta, 0.5, "random", on="gates", allocation=Budget(unit="latency", each={"mlp.act": 1.0}))
    prune(delta, 0.5, "random", on="gates", allocation=Budget(unit="latency", each={"mlp.act": 1.0, "attn.heads": 9.0}))
    spent = sum(int(m.sum()) * (9.0 if "heads" in n else 1.0) for n, m in delta.masks.items())
    assert 0 < spent <= 0.5 * 2 * (4 * 9 + 64)
