"""KAdaptation: updates of query and value in Kronecker form, with slow factors that all blocks share.

    W <- W + s sum_i A_i (x) B_i,    A_i = a_i b_i^T shared,  B_i = u_i v_i^T of the block

A product of rank-one factors has rank one, A_i (x) B_i = (a_i (x) u_i)(b_i (x) v_i)^T, so the sum is a low-rank
update of rank n. Row vectors: y = x W.

Source: He et al., 2023, "Parameter-Efficient Model Adaptation for Vision Transformers", arXiv 2203.16329,
section 3.2, and its code.
"""
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Params, Site, low_rank_add, uniform, vector, xavier, zeros
from slimtune.errors import MethodError, listing


class KAdaptation(Add):
    """Slow factors a and b, a set for each role of a tower; fast factors u and v and one bias, for each block.

    Trains 2 n^2 numbers a role, d_in + d_out a site and d a block: 50,176 on ViT-B/32 at n = 32.
    The start is corrected, u random and v 0: the code's, both 0, gives no gradient to anything but the bias.
    compat="official" has that start, and adds to the query behind its division by sqrt(head_dim).

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out).
    """

    division: int = Field(32, ge=1, description="n")
    scale: float = Field(160.0, description="s; the code's 5 alpha / r")
    sites: tuple[str, ...] = ("attn.q", "attn.v")
    compat: Literal["paper", "official"] = "paper"

    silent: ClassVar[dict[str, str]] = {r"\.(a|b)_\w+$|\.(u|v)$": "u or v is 0, so the first gradient stops there"}

    def where(self, anatomy: Anatomy) -> list[Site]:
        heads = {(s.tower, s.block, s.cross): s.head_dim for s in anatomy.sites if s.role == "attn"}
        return [replace(s, head_dim=heads.get((s.tower, s.block, s.cross), 1)) for s in super().where(anatomy)]

    def shared(self, sites: Sequence[Site]) -> Params:
        n, made = self.division, Params()
        for site in sites:
            made |= {f"a_{_role(site)}": uniform(n, n, bound=0.01), f"b_{_role(site)}": uniform(n, n, bound=0.01),
                     _bias(site): zeros(site.d_out)}
        return made

    def params(self, site: Site) -> Params:
        n = self.division
        if site.d_in % n or site.d_out % n:
            both = math.gcd(site.d_in, site.d_out)
            raise MethodError(f"KAdaptation.division={n} does not divide both widths of {site.name} ({site.d_in} -> "
                              f"{site.d_out}).",
                              f"Choose one of {listing(str(k) for k in range(1, both + 1) if both % k == 0)}.")
        c = site.d_in // n
        start = zeros(n, c) if self.compat == "official" else xavier(n, c, fan_in=c, fan_out=1)
        return {"u": start, "v": zeros(n, site.d_out // n)}

    def factors(self, p: Bound) -> tuple[Tensor, Tensor]:
        """A (n, d_in) and B (d_out, n), the update being B A."""
        a, b = p[f"a_{_role(p.site)}"], p[f"b_{_role(p.site)}"]
        return _rows(a, p["u"]), _rows(b, p["v"]).mT

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        s = self._strength(p.site)
        y = low_rank_add(y, x, *self.factors(p), s * self.scale)
        return y + s * vector(p[_bias(p.site)], y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors(p)
        s = self._strength(p.site)
        shift = s * p[_bias(p.site)]
        return weight + s * self.scale * B @ A, shift if bias is None else bias + shift

    def _strength(self, site: Site) -> float:
        return site.head_dim**0.5 if self.compat == "official" and site.role == "attn.q" else 1.0


def _rows(a: Tensor, u: Tensor) -> Tensor:
    """a_i (x) u_i, row by row. Shapes: a (n, k), u (n, c) -> (n, k c)."""
    return (a[..., :, None] * u[..., None, :]).flatten(-2)


def _role(site: Site) -> str:
    return f"{site.tower}_{'cross_' if site.cross else ''}{site.role.replace('.', '_')}"


def _bias(site: Site) -> str:
    """One bias a block, for all its sites of one width."""
    return f"bias_{site.tower}_{site.block}_{site.d_out}"
