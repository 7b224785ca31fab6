"""LoHa: the elementwise product of two low-rank matrices, whose rank is up to r^2.

    y <- y + (alpha / r) ((B1 A1) * (B2 A2)) x,    A2 = 0 at the start

Source: Hyeon-Woo et al., 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv 2108.06098, proposition 1; Yeh et al., 2023, "LyCORIS", arXiv 2309.14859. Starts as in PEFT.
"""
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, affine, kaiming, low_rank_add, zeros


class LoHa(Add):
    """Low-rank Hadamard product beside a linear map.

    Trains 2 r (d_in + d_out) numbers a site: 589,824 on BERT-base at rank 8.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out); A1, A2: (r, d_in); B1, B2: (d_out, r).
    """

    rank: int = Field(8, ge=1, description="r, of each of the two")
    alpha: float = Field(8.0, description="the update is scaled by alpha / rank")
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    silent: ClassVar[dict[str, str]] = {
        r"\.loha(_\d+)?\.(A1|B1|B2)$": "A2 is 0 at the start, so the first gradient stops there"}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def params(self, site: Site) -> Params:
        r = self.rank
        return {"B1": kaiming(site.d_out, r), "A1": kaiming(r, site.d_in),
                "B2": kaiming(site.d_out, r), "A2": zeros(r, site.d_in)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        d_out, d_in = y.shape[-1], x.shape[-1]
        if self.rank**2 * (d_in + d_out) > d_in * d_out:
            return y + affine(x, self.weight(p))
        # of rank r^2, with all products of a row of A1 with one of A2, and of a column of B1 with one of B2
        A = (p["A1"][..., :, None, :] * p["A2"][..., None, :, :]).flatten(-3, -2)
        B = (p["B1"][..., :, None] * p["B2"][..., None, :]).flatten(-2)
        return low_rank_add(y, x, A, B, self.scale)

    def weight(self, p: Bound) -> Tensor:
        return self.scale * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])
