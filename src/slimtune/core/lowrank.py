"""The low-rank add of DESIGN section 2, as one autograd function.

    y <- y + scale (drop(x) A^T) B^T

In backward, with m the kept positions, s = scale / (1 - p) and dh = s dy B:

    dy passes through;  dB = s dy^T ((x m) A^T);  dA = dh^T (x m);  dx = (dh A) m
"""
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from slimtune.core.dropout import Keep, Seed, draw_seed, drop, needs_plain_ops
from slimtune.errors import MethodError

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_LARGE = 1 << 17
Three = tuple[Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None]


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0,
                 training: bool = False) -> Tensor:
    """y <- y + scale (drop(x) A^T) B^T, in y's memory where that is allowed; use what it returns.

    y is the fresh output of a linear map, or a slice `out[..., a:b]` of one: out has changed with it if
    and only if the result is y itself. The sum is a new tensor where y may not be changed: a leaf that
    requires grad, x itself, a piece of `split` or `chunk`, an inference tensor outside inference mode.
    If another operation saved y for its backward, that backward raises (torch's version check).

    Saved for backward: x itself (not where A is frozen), the rank-sized drop(x) A^T (not where B is
    frozen), A and B; no mask, no cast copy. Under `torch.compile`, `torch.export` and the transforms of
    `torch.func` the formula runs as ordinary ops with the same mask and, to rounding, the same numbers.

    Shapes:
        x: (..., d_in); y: (..., d_out); A: (r, d_in); B: (d_out, r). A, B or both may have an example
        axis, (N, r, d_in) and (N, d_out, r), where x is (N, ..., d_in): each example has its own.
        The computation is in y's dtype; x, A and B may be wider, and get gradients in their own.

    Raises:
        MethodError: dropout outside [0, 1); an example axis that is not x's.

    Example:
        >>> x, A, B = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
        >>> low_rank_add(torch.zeros(2, 4), x, A, B, scale=0.5)[0]
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    if A.dim() == 3 or B.dim() == 3:
        _check_examples(x, A, B)
    p = dropout if training else 0.0
    seed = draw_seed() if p != 0.0 else 0
    if torch.is_autocast_enabled(y.device.type):  # every cast below is explicit
        with torch.autocast(y.device.type, enabled=False):
            return _add(y, x, A, B, scale, p, seed)
    return _add(y, x, A, B, scale, p, seed)


def _check_examples(x: Tensor, A: Tensor, B: Tensor) -> None:
    for name, value in (("A", A), ("B", B)):
        if value.dim() == 3 and (x.dim() < 2 or value.shape[0] != x.shape[0]):
            raise MethodError(f"low_rank_add: {name} is {tuple(value.shape)}, but x is {tuple(x.shape)}.",
                              "The example axis of A and B, their first of three, is the first axis of x.",
                              "Give each example of x its own A and B, or leave the axis out.")


def _add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: Seed) -> Tensor:
    if needs_plain_ops():
        return _plain(y, x, A, B, scale, p, seed)
    base = y._base
    # What a linear returns is a view of a matrix product. Adding into the product itself spares autograd
    # the two copies of dy that changing a view costs in backward.
    whole = (base is not None and base.numel() == y.numel() and base.dtype == y.dtype
             and base.is_contiguous() and y.is_contiguous())
    target = base if base is not None and whole else y
    if _locked(target, x):
        target, whole = y.clone(), False
    out: Tensor = _LowRankAdd.apply(target, x, A, B, scale, p, seed)  # type: ignore[assignment]
    return out.view(y.shape) if whole else out


def _locked(y: Tensor, x: Tensor) -> bool:
    """Whether y must not, or in autograd's eyes cannot, be changed in place."""
    if torch._C._is_alias_of(y, x):  # type: ignore[attr-defined]
        return True
    if y.is_inference() and not torch.is_inference_mode_enabled():
        return True
    owner = y if y._base is None else y._base
    if owner.is_leaf and owner.requires_grad:
        return True
    if y._base is None or not torch.is_grad_enabled():
        return False
    autograd = torch._C._autograd  # type: ignore[attr-defined]
    return autograd._get_creation_meta(y) != autograd.CreationMeta.DEFAULT


def _plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: Seed) -> Tensor:
    """The formula in ordinary differentiable ops."""
    lead = _lead(x.shape, A, B)
    a, b = _factors(A, B, lead, y.dtype)
    rows = x.reshape(*lead, x.shape[-1]).to(y.dtype)
    keep = _keep(lead, x.shape[-1], p, seed, x.device)
    if keep is not None:
        rows, scale = rows * keep.mask(rows.shape, rows.dtype), scale * keep.scale
    return y + (((rows @ a.mT) * scale) @ b.mT).reshape(y.shape)


class _LowRankAdd(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float,
                seed: Seed) -> Tensor:
        ctx.mark_dirty(y)
        lead = _lead(x.shape, A, B)
        a, b = _factors(A, B, lead, y.dtype)
        keep = _keep(lead, x.shape[-1], p, seed, x.device)
        ctx.scale = scale if keep is None else scale * keep.scale
        h = _project(x.reshape(*lead, x.shape[-1]), a, keep).mul_(ctx.scale)
        _add_product(y, h, b.mT)
        needs_a, needs_b = ctx.needs_input_grad[2:4]
        ctx.p, ctx.seed, ctx.x_shape, ctx.x_dtype = p, seed, x.shape, x.dtype
        ctx.save_for_backward(x if needs_a else None, A, B, h if needs_b else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:  # type: ignore[override]
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LowRankAdd.backward(ctx, dy)
        x, A, B, h = ctx.saved_tensors
        lead = _lead(ctx.x_shape, A, B)
        a, b = _factors(A, B, lead, dy.dtype)
        keep = _keep(lead, ctx.x_shape[-1], ctx.p, ctx.seed, dy.device)
        if x is not None:
            x = x.reshape(*lead, x.shape[-1])
        inner = _gradients_with_graph if torch.is_grad_enabled() else _gradients  # create_graph enables it
        dx, dA, dB = inner(ctx, dy.reshape(*lead, b.shape[-2]), x, a, b, h, keep)
        return (dy if ctx.needs_input_grad[0] else None,
                None if dx is None else _shaped(dx, ctx.x_shape).to(ctx.x_dtype),
                None if dA is None else dA.sum_to_size(A.shape).to(A.dtype),
                None if dB is None else dB.sum_to_size(B.shape).to(B.dtype), None, None, None)


def _gradients(ctx: Any, g: Tensor, x: Tensor | None, a: Tensor, b: Tensor, h: Tensor | None,
               keep: Keep | None) -> Three:
    """dx, dA and dB, in chunks, without a graph. Shapes: g (*lead, d_out), x (*lead, d_in), h (*lead, r)."""
    _, needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
    dB = None if not needs_b or h is None else _product(h.mT, g).mT
    if not (needs_x or needs_a):
        return None, None, dB
    dh = _product(g, b).mul_(ctx.scale)
    if keep is None:
        like_x = dh.view(*ctx.x_shape[:-1], dh.shape[-1]) if len(ctx.x_shape) > 1 and a.dim() == 2 else dh
        dx = _product(like_x, a) if needs_x else None
        return dx, None if x is None else _product(dh.mT, x.to(g.dtype)), dB
    dx = dh.new_empty(ctx.x_shape) if needs_x else None
    rows = None if dx is None else dx.view(*dh.shape[:-1], a.shape[-1])
    dA = a.new_zeros(a.shape, dtype=torch.promote_types(a.dtype, torch.float32)) if needs_a else None
    for part, cells in keep.blocks(dh.shape[:-1], g.dtype):
        if rows is not None:
            drop(_product(dh[part], _pick(a, part)), cells, out=rows[part])
        if dA is not None and x is not None:
            _pick(dA, part).add_(_product(dh[part].mT, drop(x[part].to(g.dtype), cells, out=cells)))
    return dx, dA, dB


def _shaped(dx: Tensor, shape: torch.Size) -> Tensor:
    """dx in x's shape; not as a view, if it has it: autograd adds to it in place only if it owns its memory."""
    return dx if dx.shape == shape else dx.reshape(shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, outside of autograd, for products with one side of rank r.

    oneDNN, which 16-bit products use anyway, also beats MKL here in float32: measured 1.0 to 3.0 times for
    512 tokens of width 768, 1.5 to 3.8 at 3072 (rank 8, EPYC Zen 4, two threads). A call costs it 15 us more.
    """
    if (_ONEDNN is None or a.dtype is not torch.float32 or b.dim() != 2 or a.device.type != "cpu"
            or a.numel() + b.numel() + a.numel() // a.shape[-1] * b.shape[-1] < _LARGE):
        return a @ b
    return _ONEDNN(a, b.mT, None, "none", [], "")


def _gradients_with_graph(ctx: Any, g: Tensor, x: Tensor | None, a: Tensor, b: Tensor, h: Tensor | None,
                          keep: Keep | None) -> Three:
    """The same in differentiable ops, for a double backward."""
    _, needs_x, _, needs_b = ctx.needs_input_grad[:4]
    mask = None if keep is None else keep.mask((*g.shape[:-1], a.shape[-1]), g.dtype)
    dh = (g @ b) * ctx.scale
    dx = dh @ a if needs_x else None
    if dx is not None and mask is not None:
        dx = dx * mask
    if x is None:
        if needs_b and needs_x:
            raise RuntimeError("low_rank_add: a double backward through B needs x, which is not saved "
                               "while A is frozen. Let A require grad.")
        return dx, None, None if h is None else g.mT @ h
    rows = x.to(g.dtype) if mask is None else x.to(g.dtype) * mask
    return dx, dh.mT @ rows, g.mT @ ((rows @ a.mT) * ctx.scale)


def _lead(shape: torch.Size, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """The leading axes that the matrix products run on: (tokens,), or (N, tokens) with an example axis."""
    if A.dim() == 2 and B.dim() == 2:
        return (math.prod(shape[:-1]),)
    return shape[0], math.prod(shape[1:-1])


def _factors(A: Tensor, B: Tensor, lead: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in the computation's dtype, both with the example axis or both without."""
    A, B = A.to(dtype), B.to(dtype)
    if len(lead) == 1:
        return A, B
    return A.expand(lead[0], *A.shape[-2:]), B.expand(lead[0], *B.shape[-2:])


def _keep(lead: tuple[int, ...], width: int, p: float, seed: Seed, device: torch.device) -> Keep | None:
    return None if p == 0.0 else Keep(seed, p, math.prod(lead), width, device)


def _pick(factor: Tensor, part: slice) -> Tensor:
    """The factor of a chunk of rows, or the factors of a chunk of examples."""
    return factor[part] if factor.dim() == 3 else factor


def _project(x: Tensor, a: Tensor, keep: Keep | None) -> Tensor:
    """drop(x) A^T, not scaled. Shapes: x (*lead, d_in), a ([N,] r, d_in); returns (*lead, r)."""
    if keep is None:
        return _product(x.to(a.dtype), a.mT)
    chunks = [_product(drop(x[part].to(a.dtype), cells, out=cells), _pick(a, part).mT)
              for part, cells in keep.blocks(x.shape[:-1], a.dtype)]
    return torch.cat(chunks) if len(chunks) != 1 else chunks[0]


def _add_product(y: Tensor, h: Tensor, bt: Tensor) -> None:
    """y += h B^T, in place. Shapes: h (*lead, r), bt ([N,] r, d_out)."""
    try:
        rows = y.view(*h.shape[:-1], bt.shape[-1])
    except RuntimeError:  # strides that no view of rows has, such as a transposed y
        y.add_((h @ bt).reshape(y.shape))
        return
    if bt.dim() == 2:
        rows.addmm_(h, bt)
    else:
        rows.baddbmm_(h, bt)
