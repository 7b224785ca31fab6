"""AdapterHub's adapters on the residual stream: what they read is the sum that the sub-layer's norm sees.

With r the residual and h the sub-layer's output, before a post-norm (BERT) and in a pre-norm block (GPT-2, T5, ViT):

    sequential, post-norm:  u = LN(h + r),  out = LN(f(u) + h + r)
    sequential, pre-norm:   u = h + r,      h <- h + f(u)
    parallel:               u = r,          h <- h + f(u)

Where a parallel adapter of He et al. reads the sub-layer's own input, behind the norm of a pre-norm block, this one
reads in front of it. `original_ln_before` is what AdapterHub calls the sequential forms.

Source: Poth et al., 2023, "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning",
arXiv 2311.11077, and the library's own code.
"""
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from slimtune.core import PHM, Adapter, Anatomy, Bound, Site, register
from slimtune.errors import MethodError


def norm_role(site: Site) -> str:
    """The role of the norm of a sub-layer's site.

    Example:
        >>> from slimtune.core import dissect
        >>> from slimtune.testing import tiny
        >>> norm_role(next(s for s in dissect(tiny("t5")).sites if s.role == "attn" and s.cross))
        'norm.cross'
    """
    return "norm.cross" if site.cross else f"norm.{site.role}"


class _Stream(Adapter if TYPE_CHECKING else object):  # no model, or its defaults would go before PHM's
    """Where it goes and what it reads; any projection."""

    def where(self, anatomy: Anatomy) -> list[Site]:
        norms = {(s.tower, s.block, s.role): s for s in anatomy.sites if s.role.startswith("norm.")}
        return [self._place(anatomy, site, norms) for site in super().where(anatomy)]

    def _place(self, anatomy: Anatomy, site: Site, norms: dict[tuple[str, int | None, str], Site]) -> Site:
        tower, norm = anatomy.tower(site.tower), norms.get((site.tower, site.block, norm_role(site)))
        if site.role not in ("attn", "mlp") or norm is None or (tower.grid and site.role == "attn"):
            raise MethodError(f"{type(self).__name__} cannot go on {site.name} of {anatomy.model_type}: there is no "
                              "norm of the same tokens in that sub-layer.", "It goes on attn and mlp.")
        if not tower.post_norm:
            return replace(site, source=norm.path)
        return site if self.form == "parallel" else norm  # a post-norm sub-layer's input is the residual

    def reads(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        if self.form == "parallel":
            return x
        return y if p.site.role.startswith("norm.") else x + y

    def compose(self, p: Bound, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        return p.again(update + x) if p.site.role.startswith("norm.") else y + update


@register
class StreamAdapter(_Stream, Adapter):
    """A bottleneck that reads the residual stream; Pfeiffer's on every family and sub-layer.

    Trains 2 m d + m + d numbers a site.

    Shapes:
        x: (..., T, d), the residual, or its sum with h (post-norm, sequential); y: (..., T, d), h, or the norm of x.
    """


@register
class StreamCompacter(_Stream, PHM):
    """The same with projections that are sums of Kronecker products: AdapterHub's Compacter++.

    Trains 3 (d + k) numbers a site, and n^3 once.

    Shapes:
        x: (..., T, d), the residual, or its sum with h (post-norm, sequential); y: (..., T, d), h, or the norm of x.
    """

    sites: tuple[str, ...] = ("mlp",)
