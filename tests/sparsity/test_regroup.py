"""Regroup against planted blocks, and the executor against a masked dense product."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from slimtune.errors import MethodError
from slimtune.sparsity.regroup import GroupLinear, filled, jaccard, regroup


def planted(sizes, seed, full=1.0, noise=0.0, empty=0):
    """A block-diagonal mask, its rows and columns permuted, and its blocks as sets."""
    draw = torch.Generator().manual_seed(seed)
    r, c = sum(a for a, _ in sizes) + empty, sum(b for _, b in sizes) + empty
    mask, at, blocks = torch.rand(r, c, generator=draw) < noise, [0, 0], []
    rows, columns = torch.randperm(r, generator=draw), torch.randperm(c, generator=draw)
    for a, b in sizes:
        own = rows[at[0]:at[0] + a], columns[at[1]:at[1] + b]
        mask[own[0][:, None], own[1]] = torch.rand(a, b, generator=draw) < full
        blocks.append((frozenset(own[0].tolist()), frozenset(own[1].tolist())))
        at = [at[0] + a, at[1] + b]
    return mask, set(blocks)


def as_sets(groups):
    return {(frozenset(g.rows.tolist()), frozenset(g.columns.tolist())) for g in groups}


@settings(max_examples=40, deadline=None)
@given(some.lists(some.tuples(some.integers(8, 20), some.integers(8, 24)), min_size=1, max_size=5),
       some.integers(0, 99), some.integers(0, 5))
def test_planted_blocks_are_recovered_exactly(sizes, seed, empty):
    mask, blocks = planted(sizes, seed, empty=empty)
    groups = regroup(mask, groups=1)
    assert as_sets(groups) == blocks
    assert torch.equal(filled(groups, mask), mask)
    assert sum(g.macs for g in groups) == int(mask.sum())


@pytest.mark.parametrize("seed", range(5))
def test_blocks_with_holes_and_noise_about_them(seed):
    mask, blocks = planted([(16, 24), (20, 16), (12, 20)], seed, full=0.9, noise=0.03)
    assert as_sets(regroup(mask, groups=1)) == blocks


def test_groups_bound_the_rows_of_a_block():
    mask, _ = planted([(32, 16)], 0)
    assert [len(g.rows) for g in regroup(mask, groups=2)] == [16, 16]


def test_jaccard():
    mask = torch.rand(7, 30) < 0.4
    other = torch.cat([torch.rand(4, 30) < 0.6, torch.zeros(1, 30, dtype=torch.bool)])
    found = jaccard(mask, other)
    for i in range(7):
        for j in range(5):
            a, b = ({k for k in range(30) if m[k]} for m in (mask[i], other[j]))
            assert found[i, j] == pytest.approx(len(a & b) / len(a | b))


def test_three_of_eight_columns():
    rows = torch.zeros(2, 10, dtype=torch.bool)
    rows[0, :6] = rows[1, 3:8] = True
    assert jaccard(rows[:1], rows[1:]).item() == 3 / 8


def test_nothing_alike_stays_as_it_is():
    mask = torch.eye(32, dtype=torch.bool)
    assert regroup(mask) == []
    assert torch.equal(filled([], mask), mask)
    with pytest.raises(MethodError, match="share=0"):
        regroup(mask, share=0)


@settings(max_examples=25, deadline=None)
@given(some.integers(0, 99), some.floats(0.1, 0.9), some.booleans())
def test_the_executor_is_the_masked_product(seed, density, biased):
    """On any mask, also where blocks of later rounds overlap earlier ones; gradients as well."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(40, 24, generator=draw) < density
    groups = regroup(mask, groups=4, rows=3, columns=3, share=0.4)
    weight = torch.randn(40, 24, generator=draw)
    bias = torch.randn(40, generator=draw) if biased else None
    x = torch.randn(2, 5, 24, generator=draw, requires_grad=True)
    layer = GroupLinear(weight, bias, groups)
    dense = torch.nn.functional.linear(x, weight * (filled(groups, mask) if groups else torch.zeros(())), bias)
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x),
                               torch.autograd.grad(dense.square().sum(), x), atol=1e-3, rtol=1e-4)


def test_the_executor_is_saved_and_costs_what_it_says():
    mask, _ = planted([(16, 24), (20, 16)], 3)
    groups, weight = regroup(mask, groups=1), torch.randn(36, 40)
    layer, other = GroupLinear(weight, None, groups), GroupLinear(torch.zeros(36, 40), None, groups)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), other(x))
    assert layer.macs == 16 * 24 + 20 * 16
