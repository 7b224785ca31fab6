"""The bottleneck: up(act(down(x))), the function of every adapter; and affine maps with an example axis."""
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from slimtune.core.init import Init, Params, kaiming, normal, truncated_normal, zeros
from slimtune.core.insert import Bound

Activation: TypeAlias = Literal["relu", "gelu", "gelu_new", "silu", "tanh", "identity"]
InitName: TypeAlias = Literal["bert", "lora", "houlsby"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu,
    "tanh": lambda t: t.tanh(), "identity": lambda t: t,
}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, where W and b may carry an example axis.

    Shapes: x (B, ..., d_in); weight (d_out, d_in) or (B, d_out, d_in); bias (d_out) or (B, d_out).
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    flat = x.flatten(1, -2) @ weight.mT
    if bias is not None:
        flat = flat + bias[:, None, :]
    return flat.unflatten(1, x.shape[1:-1])


def bottleneck(p: Bound, x: Tensor, activation: str, dropout: float = 0.0) -> Tensor:
    """up(drop(act(down x))). Shapes: x (..., d_in) -> (..., d_out)."""
    h = ACTIVATIONS[activation](affine(x, p["down"], p["down_bias"]))
    if dropout and p.training:
        h = F.dropout(h, dropout)
    return affine(h, p["up"], p["up_bias"])


def bottleneck_params(d_in: int, width: int, d_out: int, init: str) -> Params:
    """width (d_in + d_out) + width + d_out numbers.

    bert: all weights N(0, 0.02^2); lora: down kaiming, up 0, so that the output starts at 0;
    houlsby: N(0, 0.01^2) cut at two deviations. Biases start at 0.
    """
    make: dict[str, tuple[Init, Init]] = {
        "bert": (normal(width, d_in), normal(d_out, width)),
        "lora": (kaiming(width, d_in), zeros(d_out, width)),
        "houlsby": (truncated_normal(width, d_in, std=0.01), truncated_normal(d_out, width, std=0.01)),
        "houlsby_official": (truncated_normal(width, d_in, std=0.001), truncated_normal(d_out, width, std=0.001)),
    }
    down, up = make[init]
    return {"down": down, "down_bias": zeros(width), "up": up, "up_bias": zeros(d_out)}
