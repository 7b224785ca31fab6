"""LoRA: a low-rank update of frozen linear maps.

    y <- y + (alpha / r) (x A^T) B^T,    A: (r, d_in), B: (d_out, r), B = 0 at the start

Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3.
"""
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, kaiming, low_rank_add, zeros


class LoRA(Add):
    """Low-rank update of the query and value projections (or any linear sites).

    Trains r (d_in + d_out) numbers a site: 294,912 on BERT-base at rank 8.
    rslora: scale by alpha / sqrt(r) (Kalajdzievski, 2023, arXiv 2312.03732).

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out).
    """

    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(16.0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the update's input, in training")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    silent: ClassVar[dict[str, str]] = {r"\.lora(_\d+)?\.A$": "B is 0 at the start, so the first gradient stops there"}

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def params(self, site: Site) -> Params:
        return {"A": kaiming(self.rank, site.d_in), "B": zeros(site.d_out, self.rank)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return low_rank_add(y, x, p["A"], p["B"], self.scale, self.dropout, p.training)

    def weight(self, p: Bound) -> Tensor:
        """The update of the site's weight, (d_out, d_in): what makes the method mergeable."""
        return self.scale * p["B"] @ p["A"]
