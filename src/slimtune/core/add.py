"""Add: y <- y + f(x, y; theta) at a site's module, by a hook; or y <- y * f, and inputs likewise."""
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from slimtune.core.affine import affine
from slimtune.core.anatomy import Anatomy
from slimtune.core.bound import Bound
from slimtune.core.init import Params
from slimtune.core.insert import hook_input, hook_output
from slimtune.core.method import Builder, Method
from slimtune.core.sites import Site
from slimtune.errors import MethodError


class Add(Method):
    """The primitive of most methods. A subclass states `sites`, `params` and `forward`.

    Parameters may carry a leading example axis, [B, ...]: write `forward` with `@`, `einsum` and
    broadcasting. A method that can name its change of the weight states `weight` (or `fold`) as well,
    and can then be merged.
    """

    primitive: ClassVar[str] = "add"
    merges_where: ClassVar[str] = ""
    """Where it can be merged, for a method that has a `fold` and cannot everywhere."""
    sites: tuple[str, ...] = ()

    def where(self, anatomy: Anatomy) -> list[Site]:
        """The sites it goes on."""
        return anatomy.select(self.sites, self.blocks, who=f"method {type(self).__name__}")

    def params(self, site: Site) -> Params:
        """What it trains at one site."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site]) -> Params:
        """What it trains once for all sites."""
        return {}

    def all_params(self, sites: Sequence[Site]) -> list[Params]:
        """What it trains at each of its sites, for a method whose start depends on how many there are."""
        return [self.params(site) for site in sites]

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        """The new y of a site; by default y + x weight^T. Shapes: x (..., T, d_in), y (..., T, d_out)."""
        update = self.weight(p)
        if update is None:
            raise NotImplementedError
        return y + affine(x, update)

    def weight(self, p: Bound) -> Tensor | None:
        """The update of the site's weight, (d_out, d_in), for a method that is one."""
        return None

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (d_out, d_in) and bias that do what the hook does; float32 in and out.

        Errors: MethodError when the method has no such form.
        """
        update = self.weight(p)
        if update is None:
            raise MethodError(f"{type(self).__name__} cannot be merged: it is not linear in the site's input.",
                              "Keep it attached, or export the model with it.")
        return weight + (weight @ update if p.site.at == "input" else update), bias

    def merges_into(self, site: Site, anatomy: Anatomy) -> list[Site]:
        """The sites whose weights `fold` changes; the slot's own by default."""
        return [site]

    def install(self, build: Builder) -> None:
        self.put(build, self.where(build.anatomy))

    def put(self, build: Builder, sites: Sequence[Site]) -> None:
        """Slots and hooks at these sites."""
        for site, params in zip(sites, self.all_params(sites), strict=True):
            host = build.module(site.path)
            build.slot(self, site, site.at, params)
            (hook_input if site.at == "input" else hook_output)(host)
            if site.source is not None:
                build.feed(site)
