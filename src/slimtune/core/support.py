"""A sparse update of a matrix whose support is fixed: which entries are trained, found from the frozen weight.

`residual` is the low-rank plus sparse decomposition of DSEE's code, a GreBsmo without noise model. With Q(.) the
orthonormal factor of QR, T the hard threshold, and V of one random row at first:

    outer times:
        S = 0
        inner times:  U = Q((W - S) V^T),   V = U^T (W - S),   S = T(W - U V)
        E = W - U V - S;   V gets the first rows of R of E = Q R as further rows

The largest entries of the last S are the support. Source: Zhou and Tao, 2013, "Greedy Bilateral Sketch,
Completion & Smoothing", AISTATS; Chen et al., 2023, "DSEE", arXiv 2111.00160, section 3.2.
"""
import torch
from torch import Tensor

from slimtune.core.affine import vector


def largest(scores: Tensor, count: int) -> Tensor:
    """The flat indices of the `count` largest scores, ascending; of equal ones the first are taken.

    Example:
        >>> largest(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), 2)
        tensor([1, 2])
    """
    return scores.flatten().sort(descending=True, stable=True).indices[:count].sort().values


def residual(weight: Tensor, generator: torch.Generator, outer: int, inner: int, step: int,
             threshold: float) -> Tensor:
    """The sparse part S of weight ~ U V + S.

    In float64: which entries pass the threshold decides on the next rows of V, so that with the rounding of float32
    the largest entries are others on each machine. The first rows of R need the first columns of E alone.

    Shapes: weight and result (d_out, d_in).
    """
    W = weight.double()
    V, left, S = _alternate(W, torch.randn(1, W.shape[1], generator=generator).to(W), inner, threshold)
    for _ in range(outer - 1):
        E = left - S
        V = torch.cat([V, torch.linalg.qr(E[:, :step]).Q.mT @ E])
        V, left, S = _alternate(W, V, inner, threshold)
    return S


def _alternate(W: Tensor, V: Tensor, inner: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """V, W - U V and S of one round."""
    left = S = torch.zeros_like(W)
    for _ in range(inner):
        rest = W - S
        U = torch.linalg.qr(rest @ V.mT).Q
        V = U.mT @ rest
        left = W - U @ V
        S = left.masked_fill(left.abs() < threshold, 0.0)
    return V, left, S


def sparse_add(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """y + x S^T, where S (d_out, d_in) has `values` at the flat `indices` and 0 elsewhere; S is never made.

    Shapes: x (B, ..., d_in); y (B, ..., d_out); indices and values (N), or (B, N) with an example axis.
    """
    shape = (*x.shape[:-1], indices.shape[-1])
    flat = vector(indices.long(), x)
    rows, columns = flat // x.shape[-1], flat % x.shape[-1]
    terms = x.gather(-1, columns.expand(shape)).to(y.dtype) * vector(values, x)
    return y.scatter_add(-1, rows.expand(shape), terms)


def sparse_matrix(indices: Tensor, values: Tensor, d_out: int, d_in: int) -> Tensor:
    """S itself. Shapes: indices and values (N), or both (B, N); result (d_out, d_in) or (B, d_out, d_in).

    Example:
        >>> sparse_matrix(torch.tensor([1, 2]), torch.tensor([5.0, 7.0]), 2, 2)
        tensor([[0., 5.],
                [7., 0.]])
    """
    zero = values.new_zeros(*values.shape[:-1], d_out * d_in)
    return zero.scatter(-1, indices.long(), values).unflatten(-1, (d_out, d_in))
