"""Per-example gradients of the backbone's own tensors, kept as what they are made of and not as tensors.

    y_it = W x_it:          g_i = sum_t dy_it x_it^T
    y_it = W[k_it]:         g_i = sum_t 1[k_it] dy_it^T,    1[k] the unit vector of row k
    |g_i|^2   = sum_st <l_is, l_it> <r_is, r_it>            for g_i = sum_t l_it r_it^T
    sum_i f_i g_i = sum_it l_it (f_i r_it)^T                one product a tensor, as in a plain backward pass

So one backward pass gives every norm and then the clipped sum, and no example's gradient is ever made; but where a
weight is smaller than 2 T^2 it is, which is then cheaper. Uses of one tensor in several places add up in either.

Source: Bu et al., 2023, "Differentially Private Optimization on Large Model at Small Cost", arXiv 2210.00038 (one
backward pass; the layerwise choice); Goodfellow, 2015, "Efficient Per-Example Gradient Computations", arXiv 1510.01799.
"""
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimtune.core.insert import first
from slimtune.errors import MethodError

Grams = dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]
"""Products that several norms share, such as the one of the input of query, key and value, behind their factors: a
product is known by where its factors lie, so these must not be freed before it."""

HELD = 8
"""How many of them are held at once."""


class Whole:
    """A use whose gradients are there. Shapes: grads (B, *shape)."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads

    def each(self, shape: torch.Size) -> Tensor:
        return self.grads.reshape(-1, *shape)

    def sum(self, factors: Tensor, total: Tensor | None, shape: torch.Size) -> Tensor:
        found = (factors.to(self.grads) @ self.grads.reshape(len(factors), -1)).view(shape)
        return found if total is None else total.add_(found)

    def at(self, i: int) -> "Whole":
        """Of one example."""
        return Whole(self.grads[i:i + 1])


class Outer:
    """A use with g_i = sum_t l_it r_it^T. Shapes: left (B, T, p), or rows of p as integers (B, T); right (B, T, d)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def each(self, shape: torch.Size) -> Tensor:
        left, right = self._wide()
        if left.is_floating_point():
            return left.mT @ right
        number = torch.arange(len(left), device=left.device)[:, None] * shape[0]
        made = right.new_zeros(len(left) * shape[0], shape[1])
        return made.index_add_(0, (left + number).flatten(), right.flatten(0, 1)).view(-1, *shape)

    def sum(self, factors: Tensor, total: Tensor | None, shape: torch.Size) -> Tensor:
        left, right = self._wide()
        scale = factors.to(right)[:, None, None]
        if not left.is_floating_point():
            total = right.new_zeros(shape) if total is None else total
            return total.index_add_(0, left.flatten(), (scale * right).flatten(0, 1))
        if left.shape[-1] < right.shape[-1]:
            left = scale * left
        else:
            right = scale * right
        left, right = left.flatten(0, 1).T, right.flatten(0, 1)
        return left @ right if total is None else total.addmm_(left, right)

    def dot(self, other: "Outer", grams: Grams) -> Tensor:
        """<g_i, g_i'> with another use of the tensor. Shapes: (B)."""
        return (_gram(self.left, other.left, grams) * _gram(self.right, other.right, grams)).sum((1, 2))

    def at(self, i: int) -> "Outer":
        """Of one example."""
        return Outer(self.left[i:i + 1], self.right[i:i + 1])

    def _wide(self) -> tuple[Tensor, Tensor]:
        return _widened(self.left), _widened(self.right)


def _widened(t: Tensor) -> Tensor:
    """In float32 at least: what is summed must be what was measured."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _gram(a: Tensor, b: Tensor, grams: Grams) -> Tensor:
    """<a_is, b_it> of all pairs. Shapes: a, b (B, S, p) or rows as integers; (B, S, T)."""
    if a.dim() == 2 and b.dim() == 2:
        return a[:, :, None] == b[:, None, :]
    if a.dim() == 2:
        return _widened(b).gather(2, a[:, None, :].expand(-1, b.shape[1], -1)).mT
    if b.dim() == 2:
        return _widened(a).gather(2, b[:, None, :].expand(-1, a.shape[1], -1))
    key = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b))
    if key not in grams:
        if len(grams) >= HELD:
            grams.pop(next(iter(grams)))
        grams[key] = a, b, _widened(a) @ _widened(b).mT
    return grams[key][-1]


class Rows:
    """The gradients of each example of one tensor, as the sum over its uses.

    mask: entries that live, of the tensor's shape; the gradients of the others are 0. None: all live.

    Example:
        >>> rows = Rows(torch.Size([2, 3]), [Outer(torch.ones(4, 5, 2), torch.ones(4, 5, 3))])
        >>> rows.norms({}), rows.sum(torch.ones(4))[0, 0]
        (tensor([12.2474, 12.2474, 12.2474, 12.2474]), tensor(20.))
    """

    def __init__(self, shape: torch.Size, uses: list[Whole | Outer], mask: Tensor | None = None) -> None:
        self.shape, self.uses, self.mask = shape, uses, mask

    @property
    def size(self) -> int:
        use = self.uses[0]
        return len(use.grads if isinstance(use, Whole) else use.right)

    def each(self) -> Tensor:
        """Shapes: (B, *shape)."""
        found = [use.each(self.shape) for use in self.uses]
        each = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        return each if self.mask is None else each.masked_fill(~self.mask, 0)

    def norms(self, grams: Grams) -> Tensor:
        """Shapes: (B). grams: shared by the tensors of one batch, whose inputs are all still held."""
        outer = [use for use in self.uses if isinstance(use, Outer)]
        if len(outer) < len(self.uses):
            if len(self.uses) > 1:
                self.uses = [Whole(self.each())]
            return self.each().reshape(self.size, -1).norm(dim=1)
        if self.mask is not None:  # a masked outer product is none: one example's at a time is made
            return torch.stack([Rows(self.shape, [use.at(i) for use in outer], self.mask).each().norm()  # type: ignore
                                for i in range(self.size)])
        total = torch.zeros(())
        for i, use in enumerate(outer):
            total = total + use.dot(use, grams)
            for other in outer[:i]:
                total = total + 2 * use.dot(other, grams)
        return total.clamp_min(0).sqrt()

    def sum(self, factors: Tensor, total: Tensor | None = None) -> Tensor:
        """sum_i f_i g_i, added to `total` in place if there is one. Shapes: factors (B); the tensor's."""
        for use in self.uses:
            total = use.sum(factors, total, self.shape)
        assert total is not None
        return total if self.mask is None else total.masked_fill_(~self.mask, 0)


Keep = Callable[[str, Whole | Outer], None]
"""Takes the use of the parameter of that name."""


def keeps(module: nn.Module) -> bool:
    """Whether the module's own parameters can be kept; another's gradients are made for each example, by vmap."""
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) in (nn.Linear, nn.LayerNorm) or type(module).__name__ == "Conv1D"


def keeping(module: nn.Module, trained: Mapping[str, Tensor], size: int, keep: Keep) -> Callable[..., Tensor]:
    """The module's forward; in the backward pass it gives what is trained to `keep`, and `.grad` to nothing.

    An input whose first axis is a multiple of the examples is cut along it; positions that stand for all examples,
    (1, T), are repeated. Errors: MethodError for rows that all examples share.
    """
    names = frozenset(trained)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = first(args, kwargs)
        if x.shape[0] % size or not x.shape[0]:
            if x.shape[0] != 1 or x.is_floating_point():
                raise shared(module, size)
            x = x.expand(size, *x.shape[1:])
        own = (module._parameters["weight"], module._parameters.get("bias"))
        if isinstance(module, nn.Embedding):
            return _Embedding.apply(x, own[0], module.padding_idx, size, keep)
        if isinstance(module, nn.LayerNorm):
            return _Norm.apply(x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else x, *own,
                               module.normalized_shape, module.eps, (size, names, keep))
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, own = x.to(dtype), tuple(t if t is None else t.to(dtype) for t in own)  # type: ignore[assignment]
        # as a matrix, so that y is a view of a result that autograd knows, as F.linear's is: see low_rank_add
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), *own, not isinstance(module, nn.Linear), (size, names, keep))
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


def shared(module: nn.Module, size: int) -> MethodError:
    """Of a module that is run once for all examples."""
    return MethodError(f"{type(module).__name__} works on rows that all {size} examples share, so its trained "
                       "tensors have no per-example gradient here.", "Leave them out of what is trained.")


def _tokens(t: Tensor, size: int) -> Tensor:
    """Shapes: (B * k, ..., d) -> (B, T, d)."""
    return t.reshape(size, -1, t.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, book: Any) -> Tensor:
        ctx.turned, ctx.book = turned, book
        ctx.save_for_backward(x if "weight" in book[1] else None, weight)
        return F.linear(x, weight.T if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        size, names, keep = ctx.book
        dy = dy.contiguous()
        left = _tokens(dy, size)
        if "bias" in names:
            keep("bias", Whole(left.sum(1, dtype=torch.promote_types(dy.dtype, torch.float32))))
        if "weight" in names:
            right = _tokens(x.detach(), size)
            use = Outer(right, left) if ctx.turned else Outer(left, right)
            small = weight.numel() < 2 * left.shape[1] ** 2
            keep("weight", Whole(use.each(weight.shape)) if small else use)
        dx = (dy @ (weight.T if ctx.turned else weight)) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, size: int, keep: Keep) -> Tensor:
        ctx.padding, ctx.size, ctx.keep = padding, size, keep
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        ids, = ctx.saved_tensors
        if ctx.padding is not None:
            dy = dy.masked_fill((ids == ctx.padding)[..., None], 0)
        ctx.keep("weight", Outer(ids.reshape(ctx.size, -1), _tokens(dy, ctx.size)))
        return None, None, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, eps: float,
                book: Any) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.book = shape, book
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        size, names, keep = ctx.book
        wide = torch.promote_types(dy.dtype, torch.float32)
        if "weight" in names:
            scaled = (x.detach().to(wide) - mean) * rstd
            keep("weight", Whole(scaled.mul_(dy).view(size, -1, *ctx.shape).sum(1)))
        if "bias" in names:
            keep("bias", Whole(dy.reshape(size, -1, *ctx.shape).sum(1, dtype=wide)))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias,
                                                           [True, False, False])[0]
        return dx, None, None, None, None, None
