"""How a new parameter starts: a shape and a distribution, made once, on its final device.

Every tensor has its own generator, seeded by the delta's seed and the tensor's key, so a value
depends on neither the global random state nor the order of attaching.
"""
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Init:
    """A tensor to be made: its shape and what fills it in place, given a generator.

    dtype: that of a constant which is no float, such as indices; reads: made from the site's frozen weight.
    """

    shape: tuple[int, ...]
    fill: Callable[[Tensor, torch.Generator], object]
    trainable: bool = True
    dtype: torch.dtype | None = None
    reads: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def make(self, seed: int, key: str, device: torch.device, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
        """The tensor; on the meta device only its shape. weight: the site's, (d_out, d_in), for what reads it."""
        dtype = self.dtype or dtype
        if device.type == "meta":
            return torch.empty(self.shape, device=device, dtype=dtype)
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if self.reads is not None:
            assert weight is not None
            return self.reads(weight.detach(), generator).reshape(self.shape).to(device=device, dtype=dtype)
        value = torch.empty(self.shape, dtype=torch.float32)
        self.fill(value, generator)
        return value.to(device=device, dtype=dtype)


Params: TypeAlias = dict[str, Init]


def zeros(*shape: int) -> Init:
    """All 0."""
    return Init(shape, lambda t, g: t.zero_())


def ones(*shape: int) -> Init:
    """All 1."""
    return Init(shape, lambda t, g: t.fill_(1.0))


def normal(*shape: int, std: float = 0.02) -> Init:
    """N(0, std^2)."""
    return Init(shape, lambda t, g: t.normal_(0.0, std, generator=g))


def uniform(*shape: int, bound: float) -> Init:
    """U(-bound, bound)."""
    return Init(shape, lambda t, g: t.uniform_(-bound, bound, generator=g))


def truncated_normal(*shape: int, std: float = 0.02) -> Init:
    """N(0, std^2) cut at two standard deviations."""
    return Init(shape, lambda t, g: torch.nn.init.trunc_normal_(t, std=std, a=-2 * std, b=2 * std, generator=g))


def kaiming(d_out: int, d_in: int) -> Init:
    """U(-1/sqrt(d_in), 1/sqrt(d_in)): `nn.Linear`'s own start, kaiming-uniform with a = sqrt(5)."""
    return uniform(d_out, d_in, bound=1 / math.sqrt(d_in))


def xavier(*shape: int, fan_in: int, fan_out: int, gain: float = 1.0) -> Init:
    """U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out))."""
    return uniform(*shape, bound=gain * math.sqrt(6 / (fan_in + fan_out)))


def of_weight(*shape: int, start: Callable[[Tensor, torch.Generator], Tensor], trainable: bool = True,
              dtype: torch.dtype | None = None) -> Init:
    """What `start` makes of the site's frozen weight, (d_out, d_in), and a generator."""
    return Init(shape, lambda t, g: t, trainable, dtype, start)
