"""Sums of Kronecker products, W = sum_i A_i (x) B_i: PHM layers, Compacter, LoKr, Kronecker TARP.

Row vectors, as in the papers: y = x W with W (in, out); A_i (a, b), B_i (in / a, out / b).
"""
import torch
from torch import Tensor

from slimtune.core.affine import affine


def kron_sum(A: Tensor, B: Tensor) -> Tensor:
    """sum_i A_i (x) B_i.

    Shapes: A (n, a, b); B (n, c, d); result (a c, b d); either may carry an example axis.

    Example:
        >>> A, B = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
        >>> torch.allclose(kron_sum(A, B), torch.kron(A[0], B[0]) + torch.kron(A[1], B[1]), atol=1e-5)
        True
    """
    product = torch.einsum("...nab,...ncd->...acbd", A, B)
    return product.flatten(-4, -3).flatten(-2)


def kron_apply(x: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x sum_i A_i (x) (s_i t_i), without making the matrix.

    With x in a pieces of width c: first each piece through all s_i, then one product with A and t together,
    (a n r, b d), which is as small as the bottleneck.
    Shapes: x (B, ..., a c); A (n, a, b); s (n, c, r); t (n, r, d); result (B, ..., b d). Each factor may carry
    an example axis.
    """
    a = A.shape[-2]
    columns = s.transpose(-3, -2).flatten(-2)                                   # (c, n r)
    h = affine(x.unflatten(-1, (a, -1)), columns.mT).flatten(-2)               # (..., a n r)
    joint = torch.einsum("...nab,...nrd->...anrbd", A, t)
    return affine(h, joint.flatten(-5, -3).flatten(-2).mT)
