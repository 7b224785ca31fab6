"""Sums of Kronecker products against torch.kron in loops, with an example axis on any factor."""
from itertools import product

import pytest
import torch

from slimtune.core.kronecker import kron_apply, kron_sum

EXAMPLES, N, A_ROWS, A_COLUMNS, C, D, R = 3, 2, 3, 4, 5, 6, 2


def tensor(*shape: int, axis: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (EXAMPLES, *shape) if axis else shape
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def matrix(A, B):
    """sum_i A_i (x) B_i, entry by entry."""
    rows = [torch.stack([sum(a[p, q] * b[r, s] for a, b in zip(A, B, strict=True))
                         for q in range(A.shape[2]) for s in range(B.shape[2])])
            for p in range(A.shape[1]) for r in range(B.shape[1])]
    return torch.stack(rows)


def assert_same(out, wanted, inputs):
    torch.testing.assert_close(out, wanted)
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dy), torch.autograd.grad(wanted, inputs, dy))


@pytest.mark.parametrize(("of_A", "of_B"), product((False, True), repeat=2))
def test_kron_sum(of_A, of_B):
    A, B = tensor(N, A_ROWS, A_COLUMNS, axis=of_A), tensor(N, C, D, axis=of_B, seed=1)
    if of_A or of_B:
        wanted = torch.stack([matrix(A[i] if of_A else A, B[i] if of_B else B) for i in range(EXAMPLES)])
    else:
        wanted = matrix(A, B)
    assert_same(kron_sum(A, B), wanted, [A, B])


@pytest.mark.parametrize("lead", [(), (4,), (2, 2)])
@pytest.mark.parametrize("axes", product((False, True), repeat=3))
def test_kron_apply(lead, axes):
    if not lead and any(axes):
        lead = (1,)  # an example has tokens
    of_A, of_s, of_t = axes
    x = tensor(EXAMPLES, *lead, A_ROWS * C)
    A, s = tensor(N, A_ROWS, A_COLUMNS, axis=of_A, seed=1), tensor(N, C, R, axis=of_s, seed=2)
    t = tensor(N, R, D, axis=of_t, seed=3)
    whole = torch.stack([
        sum(torch.kron(a, u @ v) for a, u, v in zip(A[i] if of_A else A, s[i] if of_s else s, t[i] if of_t else t,
                                                    strict=True))
        for i in range(EXAMPLES)])
    wanted = torch.einsum("b...i,bij->b...j", x, whole)
    assert_same(kron_apply(x, A, s, t), wanted, [x, A, s, t])
