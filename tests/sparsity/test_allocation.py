"""Allocations against slow loops and torch.nn.utils.prune: exact counts, ties, k rules, densities."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn.utils import prune as peer

from slimtune.errors import MethodError
from slimtune.sparsity.allocation import densities, er, erk, find_allocation, global_, lowest, removed, row, uniform

levels = some.lists(some.integers(0, 4), min_size=1, max_size=30)


def slow(values, k, ties):
    """Python's sort: the first of equal ones goes first."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    if ties == "threshold" and k:
        k = sum(v <= values[order[k - 1]] for v in values)
    gone = set(order[:k])
    return [i not in gone for i in range(len(values))]


@settings(deadline=None)
@given(levels, some.floats(0, 0.99), some.sampled_from(["exact", "threshold"]),
       some.sampled_from(["floor", "ceil", "round", "above"]))
def test_the_lowest_go(values, sparsity, ties, rule):
    k = removed(sparsity, len(values), rule)
    assert lowest(torch.tensor(values, dtype=torch.float32), k, ties).tolist() == slow(values, k, ties)


@settings(deadline=None)
@given(some.lists(some.lists(some.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5),
       some.floats(0, 0.99), some.sampled_from(["exact", "threshold"]))
def test_rows_are_each_their_own(values, sparsity, ties):
    keep = row({"w": torch.tensor(values, dtype=torch.float32)}, sparsity, ties)["w"]
    assert keep.tolist() == [slow(r, removed(sparsity, 6), ties) for r in values]


@settings(deadline=None)
@given(some.lists(levels, min_size=1, max_size=4), some.floats(0, 0.99))
def test_global_is_one_list_and_uniform_each_its_own(values, sparsity):
    scores = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    flat = [v for each in values for v in each]
    together = [x for keep in global_(scores, sparsity).values() for x in keep.tolist()]
    assert together == slow(flat, removed(sparsity, len(flat)), "exact")
    apart = uniform(scores, sparsity)
    assert [apart[str(i)].tolist() for i in range(len(values))] == [
        slow(v, removed(sparsity, len(v)), "exact") for v in values]


def test_rules():
    assert [removed(0.4, 2_359_296, rule) for rule in ("floor", "ceil", "round", "above")] == [
        943_718, 943_719, 943_718, 943_719]  # SparseAdapter's code takes the ceiling
    assert [removed(s, n) for s, n in ((0.7, 10), (0.1, 30), (0.9, 84_934_656), (0.29, 100))] == [7, 3, 76_441_190, 29]
    assert removed(0.99, 1, "above") == 1
    assert removed(1 / 3, 3) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55])
def test_torch_prunes_the_same(sparsity):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(7, 5), torch.nn.Linear(5, 9)])
    scores = {f"{i}": layer.weight.detach().abs() for i, layer in enumerate(layers)}
    peer.global_unstructured([(layer, "weight") for layer in layers], peer.L1Unstructured, amount=sparsity)
    ours = global_(scores, sparsity, rule="round")
    assert all(torch.equal(ours[f"{i}"], layer.weight_mask.bool()) for i, layer in enumerate(layers))
    single = peer.l1_unstructured(torch.nn.Linear(9, 7), "weight", sparsity)
    mask = uniform({"w": single.weight_orig.detach().abs()}, sparsity, rule="round")["w"]
    assert torch.equal(mask, single.weight_mask.bool())


@settings(deadline=None)
@given(some.lists(some.tuples(some.integers(1, 12), some.integers(1, 12)), min_size=1, max_size=5),
       some.floats(0, 0.99), some.sampled_from([er, erk]))
def test_erdos_renyi_counts_are_exact(shapes, sparsity, allocation):
    scores = {str(i): torch.rand(shape) for i, shape in enumerate(shapes)}
    keep = allocation(scores, sparsity)
    total = sum(a * b for a, b in shapes)
    assert sum(int(m.sum()) for m in keep.values()) == total - removed(sparsity, total)


@settings(deadline=None)
@given(some.lists(some.tuples(some.integers(1, 20), some.integers(1, 20)), min_size=1, max_size=5), some.floats(0, 1))
def test_densities_are_the_equation(shapes, share):
    """min(1, e w) with one e for all, found here by bisection."""
    sizes = {str(i): a * b for i, (a, b) in enumerate(shapes)}
    weights = {str(i): (a + b) / (a * b) for i, (a, b) in enumerate(shapes)}
    alive = share * sum(sizes.values())
    low, high = 0.0, 1e3
    for _ in range(80):
        e = (low + high) / 2
        low, high = (e, high) if sum(min(1, e * weights[n]) * sizes[n] for n in sizes) < alive else (low, e)
    found = densities(sizes, weights, alive)
    assert all(math.isclose(found[n], min(1, high * weights[n]), abs_tol=1e-6) for n in sizes)


def test_erdos_renyi():
    equal = er({"a": torch.rand(8, 8), "b": torch.rand(8, 8)}, 0.75)
    assert [int(m.sum()) for m in equal.values()] == [16, 16]
    small, large = er({"small": torch.rand(8, 8), "large": torch.rand(64, 64)}, 0.9).values()
    assert small.float().mean() > large.float().mean()
    kernel = erk({"k": torch.rand(4, 4, 3, 3), "w": torch.rand(12, 12)}, 0.5)
    matrix = er({"k": torch.rand(4, 4, 3, 3), "w": torch.rand(12, 12)}, 0.5)
    assert int(kernel["k"].sum()) != int(matrix["k"].sum())


def test_what_is_dead_goes_first_and_nothing_else_is_ranked_before_it():
    scores = {"w": torch.tensor([1.0, -torch.inf, 0.5, -torch.inf, 2.0])}
    assert global_(scores, 0.6)["w"].tolist() == [True, False, False, False, True]


def test_unknown_names_and_units_without_rows():
    with pytest.raises(MethodError, match=r"Did you mean.*global"):
        find_allocation("globl")
    with pytest.raises(MethodError, match="no rows"):
        row({"a": torch.rand(3)}, 0.5)
