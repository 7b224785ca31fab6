"""IntrinsicDimension: few numbers, thrown by a fixed random projection onto all the weights.

    W <- W + reshape(P theta),    theta: (d), 0 at the start;    P: (D, d), P^T P = I, made from a seed

D is the size of all its weights together. With `structured`, SAID: W <- W + lambda_i reshape(P theta) in block i, with
lambda 1 at the start. The papers take P dense or as a Fastfood transform; here each of its rows has one entry (see
core/projection.py), which costs a product less and is as orthogonal.

Source: Aghajanyan et al., 2021, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
arXiv 2012.13255, section 3; Li et al., 2018, arXiv 1804.08838.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Params, Site, ones, zeros
from slimtune.core.projection import project
from slimtune.errors import MethodError


@dataclass(frozen=True)
class Share(Site):
    """A site with its share of P: rows `start` and on, of `numbers`; and which block's factor it has."""

    start: int = 0
    numbers: int = 0
    factor: int = 0


class IntrinsicDimension(Add):
    """Trains d numbers for all its sites together: 20,000 for a whole T5-base.

    A smaller d on the same sites says how hard they are to adapt; at d = D it is full tuning of their weights, each
    of which then has one number of its own. With `structured`, the factors of the blocks are among the d.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out).
    """

    dimension: int = Field(20_000, ge=1, description="d")
    structured: bool = Field(False, description="a factor for each block, out of the d numbers (SAID)")
    seed: int = Field(0, ge=0, lt=2**63, description="of the projection")
    sites: tuple[str, ...] = ("linear",)

    silent: ClassVar[dict[str, str]] = {r"\.factors$": "theta is 0 at the start, so the first gradient stops there"}

    def where(self, anatomy: Anatomy) -> list[Site]:
        sites = super().where(anatomy)
        blocks = list(dict.fromkeys((s.tower, s.block) for s in sites))
        numbers, start, found = sum(s.d_in * s.d_out for s in sites), 0, list[Site]()
        for site in sites:
            found.append(Share(**vars(site), start=start, numbers=numbers,
                               factor=blocks.index((site.tower, site.block))))
            start += site.d_in * site.d_out
        return found

    def shared(self, sites: Sequence[Site]) -> Params:
        numbers = sum(s.d_in * s.d_out for s in sites)
        factors = len({(s.tower, s.block) for s in sites}) if self.structured else 0
        if not factors < self.dimension <= numbers + factors:
            raise MethodError(f"IntrinsicDimension.dimension={self.dimension:,} does not fit: its sites have "
                              f"{numbers:,} numbers" + (f", and {factors} factors are among them." if factors else "."),
                              f"Choose {factors + 1:,} to {numbers + factors:,}.")
        made = Params(theta=zeros(self.dimension - factors))
        return made | ({"factors": ones(factors)} if factors else {})

    def params(self, site: Site) -> Params:
        return {}

    def weight(self, p: Bound) -> Tensor:
        site = p.site
        assert isinstance(site, Share)
        update = project(p["theta"], self.seed, site.numbers, site.start, site.start + site.d_in * site.d_out)
        update = update.unflatten(-1, (site.d_out, site.d_in))
        return p["factors"][..., site.factor, None, None] * update if self.structured else update
