"""The regenerated dropout mask: a function of (seed, row, column), and as good as a random one."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from slimtune.core import dropout
from slimtune.core.dropout import Keep, draw_seed, seeded_dropout
from slimtune.errors import MethodError

SEEDS = st.integers(-(1 << 62), (1 << 62) - 1)
M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def slow_mask(seed: int, p: float, rows: int, width: int) -> list[list[int]]:
    """The docstring's equations, one element at a time, on Python integers."""
    def arithmetic(value: int, shift: int, bits: int) -> int:
        return ((value - (1 << bits) if value >> (bits - 1) else value) >> shift) & ((1 << bits) - 1)

    def key(n: int) -> int:
        z = (n * 0x9E3779B97F4A7C15 + seed) & M64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ arithmetic(z, shift, 64)) * factor & M64
        return z & M32

    def half(i: int, j: int) -> int:
        t = (key((width + 1) // 2 + i) ^ key(j // 2)) * 0x9E3779B1 & M32
        t = (t ^ arithmetic(t, 15, 32)) * 0x85EBCA77 & M32
        return (t >> 16 if j % 2 else t & 0xFFFF) ^ 0x8000

    threshold = min(round(p * 65536), 65535)
    return [[int(half(i, j) >= threshold) for j in range(width)] for i in range(rows)]


def centred(seed: int, p: float, rows: int, width: int) -> torch.Tensor:
    """The mask with mean 0 and variance 1."""
    q = 1 / Keep(seed, p, 1, 1).scale
    return (Keep(seed, p, rows, width).bits().double() - q) / math.sqrt(q * (1 - q))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0, 0.999), st.integers(1, 5), st.integers(1, 9))
def test_mask_is_its_equation(seed, p, rows, width):
    assert Keep(seed, p, rows, width).bits().tolist() == slow_mask(seed, p, rows, width)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.001, 0.999), st.integers(2, 30), st.integers(1, 30), st.data())
def test_chunks_are_the_whole(seed, p, rows, width, data):
    keep = Keep(seed, p, rows, width)
    cut = data.draw(st.integers(1, rows - 1))
    torch.testing.assert_close(torch.cat([keep.bits(0, cut), keep.bits(cut, rows)]), keep.bits(), rtol=0, atol=0)
    more = Keep(seed, p, rows + 7, width).bits()
    assert torch.equal(more[:rows], keep.bits())          # more rows change no earlier one


def test_blocks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK", 64)
    keep = Keep(3, 0.3, 7 * 5, 8)
    parts = list(keep.blocks((7, 5), torch.float32))
    assert len(parts) == 7
    assert torch.equal(torch.cat([cells for _, cells in parts]), keep.mask((7, 5, 8), torch.float32))
    assert [part.start for part, _ in parts] == list(range(7))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.25, 0.5, 0.9])
def test_probability_of_the_whole_rows_and_columns(p):
    n = 512
    for seed in (0, 1, -(1 << 61)):
        z = centred(seed, p, n, n)
        assert abs(z.sum()) / n < 3.5
        for axis in (0, 1):                               # chi-square over rows, over columns
            chi = (z.sum(axis) ** 2).sum() / n
            assert abs(chi - n) / math.sqrt(2 * n) < 4


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("lanes", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=["all", "low", "high"])
def test_rows_and_columns_are_independent(p, lanes):
    """Gram matrices of rows and of columns look like those of random masks, to the fourth moment."""
    rows, z = 384, centred(11, p, 384, 768)[:, lanes]
    width = z.shape[1]
    for gram, count in ((z @ z.T / math.sqrt(width), rows), (z.T @ z / math.sqrt(rows), width)):
        off = gram[torch.triu_indices(count, count, 1).unbind()]
        pairs = off.numel()
        assert abs(off.mean()) * math.sqrt(pairs) < 4
        # Their spread sees any dependence within rectangles (i, j), (i, l), (k, j), (k, l). Over 40 masks of
        # torch.rand: variance 1.00 with deviation 0.015, fourth moment 1.06 with 0.035, maximum 5.9 with 0.5.
        assert abs(off.var() - 1) < 0.06
        assert 0.9 < (off ** 4).mean() / 3 < 1.2
        assert off.abs().max() < 7.5
    top = torch.linalg.matrix_norm(z, 2) / (math.sqrt(rows) + math.sqrt(width))
    assert 0.95 < top < 1.05                              # no hidden low-rank structure


def test_neighbours_seeds_and_low_order_patterns():
    n, p = 512, 0.3
    z = centred(5, p, n, n)
    shifted = [(z[:, :-1] * z[:, 1:]), (z[:-1] * z[1:]), (z[:-1, :-1] * z[1:, 1:]), (z[:, :-2] * z[:, 2:])]
    for seed in (6, 4, 5 + (1 << 32), 5 ^ (1 << 61)):     # the next seed is no shifted copy either
        other = centred(seed, p, n, n)
        shifted += [z * other, z[1:] * other[:-1], z[:, 2:] * other[:, :-2], z * other.T]
    for product in shifted:
        assert abs(product.sum()) / math.sqrt(product.numel()) < 4
    # all eight patterns of three neighbours in a row, as a chi-square with 7 degrees of freedom
    bits, q = Keep(5, p, n, 510).bits().long(), 1 / Keep(5, p, 1, 1).scale
    codes = (bits.reshape(n, 170, 3) * torch.tensor([4, 2, 1])).sum(-1).flatten()
    expected = np.array([q ** k.bit_count() * (1 - q) ** (3 - k.bit_count()) for k in range(8)]) * codes.numel()
    chi = ((np.bincount(codes, minlength=8) - expected) ** 2 / expected).sum()
    assert chi < 25


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.99))
def test_scale_is_of_the_realised_probability(p):
    keep = Keep(0, p, 1, 1)
    assert abs((1 - 1 / keep.scale) - p) <= 1 / 131072 or p > 65535 / 65536
    words = torch.arange(-32768, 32768).to(torch.int16).ge(keep._threshold).double()
    assert words.mean().item() * keep.scale == pytest.approx(1, abs=1e-12)   # unbiased over all 2^16 halves


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_bad_probability(p):
    with pytest.raises(MethodError, match="dropout is"):
        Keep(0, p, 1, 1)


def test_seed_is_reproducible():
    torch.manual_seed(3)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert first == [draw_seed() for _ in range(3)]
    assert len(set(first)) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 7), (5,), (0, 4)])
def test_seeded_dropout_is_mask_times_x(dtype, shape, monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK", 24)            # several chunks
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    keep = Keep(9, 0.4, math.prod(shape[:-1]), shape[-1])
    y = seeded_dropout(x, 0.4, 9)
    expected = x.detach() * keep.mask(shape, dtype) * keep.scale
    assert torch.equal(y, expected)
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy * keep.mask(shape, dtype) * keep.scale)


def test_seeded_dropout_saves_nothing():
    saved = []
    x = torch.randn(8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = seeded_dropout(x, 0.5, 1)
    y.sum().backward()
    assert saved == []
    assert torch.equal(x.grad != 0, y != 0)
    assert seeded_dropout(x, 0.0, 1) is x


def test_seeded_dropout_derivatives_and_transforms():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: seeded_dropout(x, 0.3, 2), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: seeded_dropout(x, 0.3, 2) ** 2, (x,))
    f = lambda x: seeded_dropout(x, 0.3, 2)  # noqa: E731
    expected, x = f(x), x.detach()
    assert torch.equal(torch.compile(f, backend="aot_eager")(x), expected)
    mapped = torch.func.vmap(f)(x[:, None])               # each example is a matrix of one row, the first
    assert torch.equal(mapped, torch.stack([f(row[None]) for row in x]))
