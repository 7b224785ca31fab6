"""The support of a sparse update: the decomposition as it is published, and index operations against loops."""
from itertools import product

import pytest
import torch

from slimtune.core.support import largest, residual, sparse_add, sparse_matrix

B, T, D_IN, D_OUT, N = 3, 4, 6, 5, 7


def published(W, generator, outer, inner, step, threshold):
    """The decomposition of DSEE's code, line by line."""
    V = torch.randn(1, W.shape[1], generator=generator).double()
    for _ in range(outer):
        S = torch.zeros_like(W)
        for _ in range(inner):
            U, _ = torch.linalg.qr((W - S) @ V.T)
            V = U.T @ (W - S)
            S = W - U @ V
            S[S.abs() < threshold] = 0
        E = W - U @ V - S
        _, R = torch.linalg.qr(E)
        V = torch.cat([V, R[:step]])
    return S


@pytest.mark.parametrize(("shape", "outer", "inner", "step"), [
    ((48, 40), 6, 2, 5), ((40, 48), 6, 2, 5), ((32, 32), 1, 2, 5), ((48, 48), 3, 3, 2)])
def test_the_decomposition(shape, outer, inner, step):
    W = 0.05 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own, wanted = (f(W.clone(), torch.Generator().manual_seed(1), outer, inner, step, 0.01)
                   for f in (residual, published))
    assert 0 < (wanted == 0).sum() < W.numel()
    torch.testing.assert_close(own, wanted)
    assert torch.equal(largest(own.abs(), 20), largest(wanted.abs(), 20))


def test_of_equal_scores_the_first_are_taken():
    scores = torch.randint(0, 4, (9, 11), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 20, 98, 99):
        ordered = sorted(range(99), key=lambda i: (-float(scores.flatten()[i]), i))
        assert largest(scores, count).tolist() == sorted(ordered[:count])


@pytest.mark.parametrize(("of_indices", "of_values"), product((False, True), repeat=2))
def test_index_operations(of_indices, of_values):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, T, d, dtype=torch.float64, generator=g).requires_grad_() for d in (D_IN, D_OUT))
    indices = torch.stack([torch.randperm(D_IN * D_OUT, generator=g)[:N] for _ in range(B)]).int()
    values = torch.randn(B, N, dtype=torch.float64, generator=g).requires_grad_()
    indices, used = indices if of_indices else indices[0], values if of_values else values[0]
    dense = []
    for b in range(B):
        S = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        for i, v in zip(indices[b] if of_indices else indices, used[b] if of_values else used, strict=True):
            S = S + v * torch.eye(D_OUT * D_IN, dtype=torch.float64)[int(i)].view(D_OUT, D_IN)
        dense.append(S)
    wanted = torch.stack([y[b] + x[b] @ dense[b].T for b in range(B)])
    out = sparse_add(y, x, indices, used)
    torch.testing.assert_close(out, wanted)
    dy = torch.randn(wanted.shape, dtype=torch.float64, generator=g)
    inputs = (x, y, values)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dy), torch.autograd.grad(wanted, inputs, dy))
    if of_indices == of_values:
        assert torch.equal(sparse_matrix(indices, used, D_OUT, D_IN), torch.stack(dense) if of_values else dense[0])


def test_what_is_saved_for_backward_is_x_and_one_number_for_each_read():
    x, y, values = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 50), torch.randn(9, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_add(y, x, torch.randperm(2000)[:9].int(), values).sum().backward()
    others = [t.untyped_storage().nbytes() for t in saved if t.data_ptr() != x.data_ptr()]
    assert others
    assert max(others) == 2 * 3 * 9 * 4  # a matrix has 8,000 bytes
    assert values.grad.shape == (9,)
