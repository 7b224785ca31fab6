"""Unfreeze: the backbone's own tensors, trained as a copy that stands in their place.

An owned tensor is a second parameter; while its delta is active the module's slot points at it, and
otherwise at the base's. Switching, disabling and detaching move pointers and never copy a number, so
the base stays bitwise what it was.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimtune.core.insert import CHILD
from slimtune.core.method import Builder, Method

Group = Literal["adapter", "norms", "head", "pruned"]


@dataclass
class Owned:
    """One tensor of the backbone that a delta trains: where it stands, the base's, and the delta's.

    A tied tensor stands in several places. One of the group "pruned" is not trained: it is the base's, masked.
    """

    path: str
    group: Group
    base: nn.Parameter
    value: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{'head' if self.group == 'head' else 'own'}.{self.path}"

    def swap(self, active: bool) -> None:
        """Point the places at the delta's tensor, or back at the base's."""
        self.follow()
        new = self.value if active else self.base
        for module, name in self.places:
            module._parameters[name] = new

    def follow(self) -> None:
        """Bring the tensor that does not stand in the model to where and what the other is now."""
        module, name = self.places[0]
        now = module._parameters[name]
        for tensor in (self.base, self.value):
            if now is not None and (tensor.device != now.device or tensor.dtype != now.dtype):
                tensor.data = tensor.data.to(now.device, now.dtype)


class Unfreeze(Method):
    """The primitive of full and partial fine-tuning. A subclass states `tensors`."""

    primitive: ClassVar[str] = "unfreeze"

    def tensors(self, build: Builder) -> list[str]:
        """The paths of the tensors it trains, head apart."""
        raise NotImplementedError

    def install(self, build: Builder) -> None:
        build.own(self.tensors(build), "adapter")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The backbone's and head's own modules with their paths, each once; as fast with a thousand deltas as without."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        waiting += [(f"{path}.{name}".removeprefix("."), child) for name, child in reversed(module._modules.items())
                    if child is not None and name != CHILD]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's and head's own parameters by path, tied ones once, none of ours."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in base_modules(model):
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}".removeprefix("."), p))
    return dict(found.values())


def places_of(model: nn.Module, wanted: set[int]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, name) at which each parameter, known by id, stands."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                found.setdefault(id(parameter), []).append((module, name))
    return found


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(value: Tensor, base: Tensor) -> Tensor:
    """value xor base, bit by bit: the difference that restores the value exactly.

    Example:
        >>> base, value = torch.tensor([0.1, 2.0]), torch.tensor([0.3, -7.0])
        >>> torch.equal(restore(difference(value, base), base), value)
        True
    """
    bits = _BITS[value.element_size()]
    return value.detach().contiguous().view(bits) ^ base.detach().contiguous().view(bits)


def restore(diff: Tensor, base: Tensor) -> Tensor:
    """The value whose `difference` from base is given."""
    return (diff ^ base.detach().contiguous().view(diff.dtype)).view(base.dtype)


def is_frozen_kind(value: Any) -> bool:
    """Whether a parameter cannot be trained at all: integers, and floats of 8 bits and fewer."""
    return not value.is_floating_point() or value.element_size() < 2
