"""A fixed random projection R^d -> R^D with orthonormal columns, made anew from its seed and never kept.

    (P t)_i = s_i c_j t_j,    i = k d + r,    j = (a_k r + b_k) mod d,    s_i = 1 or -1

Each run k of d numbers is t in another order, with random signs; a_k is prime to d. So every t_j is taken by n_j
numbers, D / d rounded down or up, and by no other column's: with c_j = 1 / sqrt(n_j), P^T P = I and |P t| = |t|. The
last run, which may be short, has t in its own order. At d = D the columns are the axes, but for order and signs.

All of it is arithmetic on integers: the same on every device. Signs as in dropout.py.
"""
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from slimtune.core.dropout import needs_plain_ops

PRIMES = (
    2250897157, 2394597701, 2426786561, 2619639343, 2814794783, 2927271031, 3034209923, 3214943311,
    3317338621, 3414080977, 3527046937, 3699533951, 3795609113, 3917770063, 4093776623, 4200199273)
"""Larger than any d, so prime to it."""
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_WORD1, _WORD2 = -1640531535, -2048144777


def project(t: Tensor, seed: int, numbers: int, start: int, stop: int) -> Tensor:
    """Numbers start to stop of P t, where P t has `numbers` in all; nothing is saved for backward.

    Shapes: t (d) or (B, d), d <= numbers -> (stop - start) or (B, stop - start).
    Example:
        >>> t = torch.tensor([3.0, 4.0])
        >>> float(project(t, 0, 1000, 0, 1000).norm().round(decimals=4))
        5.0
    """
    if needs_plain_ops():
        return _plain(t, seed, numbers, start, stop)
    return _Project.apply(t, seed, numbers, start, stop)  # type: ignore[return-value]


def _plain(t: Tensor, seed: int, numbers: int, start: int, stop: int) -> Tensor:
    t = t * _scales(t, numbers)
    return torch.cat([t, -t], -1)[..., _cells(t.shape[-1], seed, numbers, start, stop, t.device)]


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, seed: int, numbers: int, start: int, stop: int) -> Tensor:
        ctx.size, ctx.of = t.shape[-1], (seed, numbers, start, stop)
        return _plain(t, seed, numbers, start, stop)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        seed, numbers, start, stop = ctx.of
        cells = _cells(ctx.size, seed, numbers, start, stop, dy.device)
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))  # a column sums over many
        plus, minus = wide.new_zeros(*dy.shape[:-1], 2 * ctx.size).index_add_(-1, cells, wide).split(ctx.size, -1)
        return ((plus - minus) * _scales(plus, numbers)).to(dy.dtype), None, None, None, None


def _scales(t: Tensor, numbers: int) -> Tensor:
    """c, (d)."""
    d = t.shape[-1]
    whole, left = divmod(numbers, d)
    scales = t.new_full((d,), 1 / math.sqrt(whole))
    scales[:left] = 1 / math.sqrt(whole + 1)
    return scales


def _cells(d: int, seed: int, numbers: int, start: int, stop: int, device: torch.device) -> Tensor:
    """For each number its j, plus d where its sign is -1. Shapes: (stop - start), int64."""
    order, shift, rows, columns = _mix(torch.arange(4, device=device), seed)
    parts = []
    for k, k_stop, r, r_stop in _runs(start, stop, d):
        runs = torch.arange(k, k_stop, device=device)
        places = torch.arange(r, r_stop, device=device)
        own = runs == numbers // d  # the short run
        a = (torch.tensor(PRIMES, device=device) % d)[_mix(runs, order) & 15].masked_fill(own, 1)
        b = ((_mix(runs, shift) & 0x7FFFFFFF) % d).masked_fill(own, 0)
        j = (a[:, None] * places + b[:, None]).remainder_(d)
        words = (_mix(runs, rows).to(torch.int32)[:, None] ^ _mix(places, columns).to(torch.int32)) * _WORD1
        words = (words ^ (words >> 15)) * _WORD2
        parts.append(j.add_((words < 0).to(torch.int64), alpha=d).flatten())
    return torch.cat(parts)


def _runs(start: int, stop: int, d: int) -> Iterator[tuple[int, int, int, int]]:
    """start to stop as rectangles of runs k and places r: (k, k_stop, r, r_stop)."""
    (k, r), (last, end) = divmod(start, d), divmod(stop, d)
    if k == last:
        yield k, k + 1, r, end
        return
    if r:
        yield k, k + 1, r, d
        k += 1
    if k < last:
        yield k, last, 0, d
    if end:
        yield last, last + 1, 0, end


def _mix(counters: Tensor, key: int | Tensor) -> Tensor:
    """splitmix64."""
    words = counters * _GOLDEN + key
    words = (words ^ (words >> 30)) * _MIX1
    words = (words ^ (words >> 27)) * _MIX2
    return words ^ (words >> 31)
