"""DSEE: a low-rank update and a sparse one, whose support is found from the frozen weight.

    y <- y + (alpha / r) (B A + S2) x,    A ~ N(0, 0.02^2), B = 0, S2 = 0 at the start

Only N entries of S2 are ever other than 0; which ones, and the starts, are as in the paper's code.

Source: Chen et al., 2023, "DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language Models", arXiv
2111.00160, section 3.
"""
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, low_rank_add, normal, of_weight, zeros
from slimtune.core.linear import need_linear
from slimtune.core.support import largest, residual, sparse_add, sparse_matrix
from slimtune.errors import MethodError


class DSEE(Add):
    """The update half of DSEE; the mask of the frozen weight is a matter of pruning.

    Trains r (d_in + d_out) + N numbers a site: 591,360 on BERT-base at r = 16 and N = 64. The N indices are stored
    beside the values, and a saved delta brings its own: they are found once, when the method is first attached.
    support: the N entries largest in the sparse part of the weight's decomposition ("grebsmo", see core/support.py),
    in the weight itself ("magnitude"), or in noise ("random").
    outer: rounds of that decomposition, 5 more ranks each. The paper's scripts take 100: six seconds of one core for a
    matrix of width 768, and nothing sparse is left of a width up to 496. 20 takes 0.4 seconds, and goes on every
    width above 96.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out).
    """

    rank: int = Field(16, ge=1, description="r")
    alpha: float = Field(32.0, description="both updates are scaled by alpha / rank")
    nonzero: int = Field(64, ge=1, description="N, entries of S2 a site")
    support: Literal["grebsmo", "magnitude", "random"] = Field("grebsmo", description="how they are chosen")
    outer: int = Field(20, ge=1, description="rounds of grebsmo")
    inner: int = Field(2, ge=1, description="alternations a round")
    step: int = Field(5, ge=1, description="ranks that a round adds")
    threshold: float = Field(0.01, ge=0.0, description="residuals below it are not sparse")
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    silent: ClassVar[dict[str, str]] = {r"\.dsee(_\d+)?\.A$": "B is 0 at the start, so the first gradient stops there"}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def params(self, site: Site) -> Params:
        need_linear(site, "DSEE")
        if self.nonzero > site.d_in * site.d_out:
            raise MethodError(f"DSEE.nonzero={self.nonzero} is more than the {site.d_out} x {site.d_in} entries of "
                              f"{site.name}.", "Choose fewer.")
        return {"A": normal(self.rank, site.d_in), "B": zeros(site.d_out, self.rank), "values": zeros(self.nonzero),
                "indices": of_weight(self.nonzero, start=self._support, trainable=False, dtype=torch.int32)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        y = sparse_add(y, x, p["indices"], self.scale * p["values"])
        return low_rank_add(y, x, p["A"], p["B"], self.scale)

    def weight(self, p: Bound) -> Tensor:
        sparse = sparse_matrix(p["indices"], p["values"], p.site.d_out, p.site.d_in)
        return self.scale * (p["B"] @ p["A"] + sparse)

    def _support(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        if self.support == "magnitude":
            return largest(weight.abs(), self.nonzero)
        if self.support == "random":
            return largest(torch.randn(weight.shape, generator=generator).abs(), self.nonzero)
        sparse = residual(weight, generator, self.outer, self.inner, self.step, self.threshold).abs()
        found = int((sparse > 0).sum())
        if found < self.nonzero:
            raise MethodError(
                f"DSEE: {self.outer} rounds on a {' x '.join(map(str, weight.shape))} weight leave {found} entries "
                f"of at least {self.threshold} beside a part of rank {1 + self.step * (self.outer - 1)}, and "
                f"nonzero={self.nonzero} are wanted.",
                "Lower outer, threshold or nonzero, or choose support='magnitude'.")
        return largest(sparse, self.nonzero)
