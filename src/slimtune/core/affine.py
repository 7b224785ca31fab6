"""Affine maps, and vectors and scalars over a token axis, whose parameters may carry an example axis."""
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

Activation: TypeAlias = Literal["relu", "gelu", "gelu_new", "silu", "quick_gelu", "tanh", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu,
    "quick_gelu": lambda t: t * (1.702 * t).sigmoid(), "tanh": lambda t: t.tanh(), "identity": lambda t: t,
}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, where W and b may carry an example axis.

    Shapes: x (B, ..., d_in); weight (d_out, d_in) or (B, d_out, d_in); bias (d_out) or (B, d_out).
    """
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    if weight.dim() == 2:
        return F.linear(x, weight) + vector(bias, x)  # type: ignore[arg-type]
    if x.dim() == 2:  # one vector an example
        return affine(x[:, None], weight, bias)[:, 0]
    flat = x.flatten(1, -2) @ weight.mT
    if bias is not None:
        flat = flat + (bias if bias.dim() == 1 else bias[:, None, :])
    return flat.unflatten(1, x.shape[1:-1])


def vector(v: Tensor, y: Tensor) -> Tensor:
    """v so that it broadcasts over y's tokens. Shapes: v (d) or (B, d); y (B, ..., d)."""
    return v if v.dim() == 1 else v.view(-1, *[1] * (y.dim() - 2), v.shape[-1])


def scalar(s: Tensor, y: Tensor) -> Tensor:
    """s so that it broadcasts over all of an example. Shapes: s () or (B); y (B, ..., d)."""
    return s if s.dim() == 0 else s.view(-1, *[1] * (y.dim() - 1))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / std * weight + bias over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * vector(weight, x) + vector(bias, x)
