"""Bound: what a method's equation runs on at one site, in one forward."""
import torch
from torch import Tensor, nn

from slimtune.core.sites import Site


class Bound:
    """The tensors a method's equation runs on, with the facts of the place: `p["A"]`, `p.training`."""

    def __init__(self, values: dict[str, Tensor], site: Site, training: bool, host: nn.Module | None = None) -> None:
        self.values, self.site, self.training, self.host = values, site, training, host

    def again(self, t: Tensor) -> Tensor:
        """The host module run on another input, for methods that pass a norm twice."""
        assert self.host is not None
        return self.host.forward(t)

    @property
    def base(self) -> Tensor:
        """The site's frozen weight, (d_out, d_in), in the dtype of the parameters."""
        assert self.host is not None
        weight = weight_at(self.host, self.site)
        return cast(weight, next(iter(self.values.values())).dtype)

    @property
    def base_bias(self) -> Tensor | None:
        """The site's frozen bias, (d_out), or None."""
        bias = None if self.host is None else self.host._parameters.get("bias")
        if bias is None:
            return None
        part = slice(None) if self.site.part is None else slice(*self.site.part)
        return cast(bias[part], next(iter(self.values.values())).dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values


def weight_at(host: nn.Module, site: Site) -> Tensor:
    """The host's weight as the site sees it: (d_out, d_in), its slice where the projection is fused."""
    weight: Tensor = host._parameters["weight"]  # type: ignore[assignment]
    view = weight.mT if site.transposed else weight
    return view if site.part is None else view[slice(*site.part)]


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
