"""LoKr: a Kronecker product with a low-rank factor.

    y <- y + (alpha / r) (C (x) (B A)) x,    C = 0 at the start

Source: Yeh et al., 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv 2309.14859, section 3. Shapes and starts as in PEFT.
"""
from math import isqrt
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, affine, kaiming, kron_sum, zeros


class LoKr(Add):
    """A Kronecker product beside a linear map.

    Each width is split in two, d_in = a b and d_out = c e, as near to the square root as its divisors allow, or with
    `factor` as a and c. Trains a c + r (b + e) numbers a site: 26,112 on BERT-base at rank 8. Where r is half of b and
    e or more, one full factor of b e numbers stands for B A.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out); C: (c, a); A: (r, b); B: (e, r), or W: (e, b).
    """

    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(8.0, description="the update is scaled by alpha / rank")
    factor: int | None = Field(None, ge=1, description="a and c; where it divides not, the largest divisor up to it "
                               "and to the width's root")
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    silent: ClassVar[dict[str, str]] = {
        r"\.lokr(_\d+)?\.[ABW]$": "C is 0 at the start, so the first gradient stops there"}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def params(self, site: Site) -> Params:
        (a, b), (c, e) = split(site.d_in, self.factor), split(site.d_out, self.factor)
        if 2 * self.rank >= max(b, e):
            return {"C": zeros(c, a), "W": kaiming(e, b)}
        return {"C": zeros(c, a), "B": kaiming(e, self.rank), "A": kaiming(self.rank, b)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        C = self.scale * p["C"]
        h = x.unflatten(-1, (C.shape[-1], -1))  # (..., T, a, b): A, C and B each on an axis of its own
        if "A" in p:
            h = affine(h, p["A"])
        h = affine(h.mT, C).mT
        return y + affine(h, p["B"] if "B" in p else p["W"]).flatten(-2)

    def weight(self, p: Bound) -> Tensor:
        second = p["W"] if "W" in p else p["B"] @ p["A"]
        return self.scale * kron_sum(p["C"].unsqueeze(-3), second.unsqueeze(-3))


def split(width: int, factor: int | None = None) -> tuple[int, int]:
    """Two numbers whose product is the width.

    Example:
        >>> split(768), split(768, factor=8), split(768, factor=7), split(768, factor=100)
        ((24, 32), (8, 96), (6, 128), (24, 32))
    """
    if factor is not None and width % factor == 0:
        return factor, width // factor
    first = max(d for d in range(1, isqrt(width) + 1) if width % d == 0 and (factor is None or d <= factor))
    return first, width // first
