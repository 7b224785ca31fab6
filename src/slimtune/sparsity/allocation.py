"""Allocation: how much of each tensor is pruned, when its scores are given.

k = floor(s n) units of n go, those of the lowest scores; of equal ones, the first. What is dead goes first and counts.

    uniform    k of each tensor                      global    k of all tensors together
    row        k of each row, as Wanda compares      er, erk   density ~ (n_in + n_out) / (n_in n_out), k of all
    budget     the best under a sum of costs (see budget.py)

Source: of er and erk, Mocanu et al., 2018, "Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity", arXiv 1707.04780, and Evci et al., 2020, "Rigging the Lottery", arXiv 1911.11134, section 3.
"""
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from slimtune.errors import MethodError, listing, suggest

Ties: TypeAlias = Literal["exact", "threshold"]
Rule: TypeAlias = Literal["floor", "ceil", "round", "above"]
Scores: TypeAlias = Mapping[str, Tensor]
Keep: TypeAlias = dict[str, Tensor]


def removed(sparsity: float, count: int, rule: Rule = "floor") -> int:
    """k, the number of units that go.

    rule: "floor"; "ceil", as SparseAdapter's code; "round", as torch.nn.utils.prune; "above", floor + 1, as the code of
    "Rethinking the Value of Network Pruning".

    Example:
        >>> [removed(0.5, 5, rule) for rule in ("floor", "ceil", "round", "above")]
        [2, 3, 2, 3]
    """
    exact = round(sparsity * count, 6)  # 0.7 * 10 is 7, not 6.999...
    k = {"floor": math.floor(exact), "ceil": math.ceil(exact), "round": round(exact),
         "above": math.floor(exact) + 1}[rule]
    return min(k, count)


def lowest(scores: Tensor, k: int, ties: Ties = "exact") -> Tensor:
    """True for the units that stay when the k lowest go.

    ties: of units that score as the last to go, "exact" removes the first ones, and k in all; "threshold" removes them
    all, as Intel's code does.

    Example:
        >>> lowest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 1).tolist()
        [True, False, True, True]
    """
    flat = scores.reshape(-1)
    if k <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(k).values
    keep = flat > threshold
    if ties == "exact":
        tied = (flat == threshold).nonzero().squeeze(1)
        below = int((flat < threshold).sum())
        keep[tied[k - below:]] = True
    return keep.reshape(scores.shape)


def uniform(scores: Scores, sparsity: float, ties: Ties = "exact", rule: Rule = "floor") -> Keep:
    """The same share of each tensor."""
    return {name: lowest(s, removed(sparsity, s.numel(), rule), ties) for name, s in scores.items()}


def global_(scores: Scores, sparsity: float, ties: Ties = "exact", rule: Rule = "floor") -> Keep:
    """One threshold for all tensors."""
    if not scores:
        return {}
    flat = torch.cat([s.reshape(-1).float() if s.dtype != torch.float64 else s.reshape(-1) for s in scores.values()])
    keep = lowest(flat, removed(sparsity, flat.numel(), rule), ties)
    parts = keep.split([s.numel() for s in scores.values()])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def row(scores: Scores, sparsity: float, ties: Ties = "exact", rule: Rule = "floor") -> Keep:
    """The same share of each row, that is of what enters one output. Errors: MethodError for units without rows."""
    if flat := [name for name, s in scores.items() if s.dim() != 2]:
        raise MethodError(f"allocation 'row': {flat[0]} has no rows.", "Choose uniform or global.")
    return {name: _rows(s, removed(sparsity, s.shape[1], rule), ties) for name, s in scores.items()}


def _rows(scores: Tensor, k: int, ties: Ties) -> Tensor:
    """`lowest` of each row."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    if k > 0 and ties == "threshold":
        keep = scores > scores.kthvalue(k, 1, keepdim=True).values
    elif k > 0:
        keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, :k], False)
    return keep


def er(scores: Scores, sparsity: float, ties: Ties = "exact", rule: Rule = "floor") -> Keep:
    """Erdos-Renyi: the density of a tensor goes with (n_in + n_out) / (n_in n_out), at most 1."""
    return _by_density(scores, sparsity, lambda s: sum(s.shape[:2]) / math.prod(s.shape[:2]), ties, rule)


def erk(scores: Scores, sparsity: float, ties: Ties = "exact", rule: Rule = "floor") -> Keep:
    """Erdos-Renyi with the sizes of a convolution's kernel in sum and product; `er` for matrices."""
    return _by_density(scores, sparsity, lambda s: sum(s.shape) / math.prod(s.shape), ties, rule)


def _by_density(scores: Scores, sparsity: float, weight: Callable[[Tensor], float], ties: Ties, rule: Rule) -> Keep:
    total = sum(s.numel() for s in scores.values())
    alive = total - removed(sparsity, total, rule)
    shares = densities({n: s.numel() for n, s in scores.items()}, {n: weight(s) for n, s in scores.items()}, alive)
    counts = _whole({n: shares[n] * s.numel() for n, s in scores.items()}, alive,
                    {n: s.numel() for n, s in scores.items()})
    return {n: lowest(s, s.numel() - counts[n], ties) for n, s in scores.items()}


def densities(sizes: Mapping[str, int], weights: Mapping[str, float], alive: float) -> dict[str, float]:
    """min(1, e w) of each tensor, with e such that `alive` units live in all."""
    full: set[str] = set()
    while True:
        rest = {n for n in sizes if n not in full}
        room = alive - sum(sizes[n] for n in full)
        scale = room / max(sum(weights[n] * sizes[n] for n in rest), 1e-300) if rest else 0.0
        over = {n for n in rest if scale * weights[n] > 1}
        if not over:
            return {n: 1.0 if n in full else scale * weights[n] for n in sizes}
        full |= over


def _whole(shares: Mapping[str, float], total: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers that add up to the total: rounded down, the largest remainders up."""
    counts = {n: min(math.floor(round(v, 9)), limits[n]) for n, v in shares.items()}
    order = sorted(shares, key=lambda n: counts[n] - shares[n])
    for n in [n for n in order if counts[n] < limits[n]][: max(total - sum(counts.values()), 0)]:
        counts[n] += 1
    return counts


ALLOCATIONS: dict[str, Callable[..., Keep]] = {"uniform": uniform, "global": global_, "row": row, "er": er, "erk": erk}


def find_allocation(name: str) -> Callable[..., Keep]:
    """Errors: MethodError for an unknown name; it lists those that exist."""
    if name not in ALLOCATIONS:
        raise MethodError(f"no allocation is named '{name}'.", f"There are: {listing(ALLOCATIONS)} and Budget(...)",
                          suggest(name, ALLOCATIONS))
    return ALLOCATIONS[name]
