"""What stands in a shrunk model in place of the backbone's own modules: two thin linears, or next to nothing."""
from typing import Any

import torch
from torch import Tensor, nn


class Factored(nn.Module):
    """y = U (D x) + b: a linear map of rank r, with r (d_in + d_out) weights.

    Shapes: D (r, d_in), U (d_out, r); x (..., d_in) -> (..., d_out).
    Example:
        >>> Factored(6, 4, rank=2)(torch.zeros(3, 6)).shape
        torch.Size([3, 4])
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Constant(nn.Module):
    """A linear map that has no input left: its bias, or 0, for each token. Runtimes refuse matrices of no width.

    Shapes: x (..., 0) -> (..., width).
    Example:
        >>> Constant(2)(torch.zeros(1, 3, 0)).tolist()
        [[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = 0, width
        self.register_parameter("weight", None)  # T5 asks for its dtype
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.out_features) if self.bias is None else self.bias.to(x.dtype)
        return out.expand(*x.shape[:-1], self.out_features)


class Silent(nn.Module):
    """An attention that has no head left: the bias of its output projection, whatever comes in.

    width: of what it returns, 0 where the output projection stands behind the attention module and not inside.
    A cache still learns how many tokens have passed, for that is what positions are counted by.
    """

    def __init__(self, width: int, bias: bool = True, layer_idx: int | None = None) -> None:
        super().__init__()
        self.width, self.layer_idx = width, layer_idx
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and kwargs.get("key_value_states") is None and self.layer_idx is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            passed = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        out = x.new_zeros(self.width) if self.bias is None else self.bias.to(x.dtype)
        return out.expand(*x.shape[:-1], self.width), None
