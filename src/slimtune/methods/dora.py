"""DoRA: a weight's direction learns by a low-rank update, and its magnitude by a vector.

    W = m (W0 + s B A) / ||W0 + s B A||,    s = alpha / r,  B = 0 and m = ||W0|| at the start

The norm is that of each row, one an output, as in the authors' code; no gradient goes through it.

Source: Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5 and
section 4.3.
"""
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, kaiming, low_rank_add, of_weight, vector, zeros
from slimtune.core.linear import need_linear


class DoRA(Add):
    """LoRA of the direction, and a magnitude for each output.

    Trains r (d_in + d_out) + d_out numbers a site: 313,344 on BERT-base at rank 8. B A is never made: with g the
    quotient of m and norm, y = g W0 x + g s B A x + b, and the norm is a sum over products of rank r.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out); m: (d_out).
    """

    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(16.0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the low-rank update's input, in training")
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    silent: ClassVar[dict[str, str]] = {r"\.dora(_\d+)?\.A$": "B is 0 at the start, so the first gradient stops there"}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def params(self, site: Site) -> Params:
        need_linear(site, "DoRA")
        return {"A": kaiming(self.rank, site.d_in), "B": zeros(site.d_out, self.rank),
                "m": of_weight(site.d_out, start=lambda weight, _: _square(weight).sqrt())}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        g, bias = p["m"] / self._norm(p), p.base_bias
        product = y if bias is None else y - bias
        y = y + vector(g - 1, y) * product  # where g is 1, y itself
        return low_rank_add(y, x, p["A"], g[..., None] * p["B"], self.scale, self.dropout, p.training)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        g = p["m"] / self._norm(p)
        return g[:, None] * (weight + self.scale * p["B"] @ p["A"]), bias

    @torch.no_grad()
    def _norm(self, p: Bound) -> Tensor:
        """||W0 + s B A|| of each row, (d_out): the root of W0 W0^T + 2 s B A W0^T + s^2 B A A^T B^T's diagonal."""
        A, B, weight = p["A"], p["B"], p.base
        mixed, own = (weight @ A.mT * B).sum(-1), (B @ (A @ A.mT) * B).sum(-1)
        square = _square(weight) + 2 * self.scale * mixed + self.scale**2 * own
        least = torch.finfo(square.dtype).tiny  # a row of zeros stays one
        return square.clamp_min(least).sqrt().to(weight.dtype)


def _square(weight: Tensor) -> Tensor:
    """The squared norm of each row, in float32 at least: the start's m and the norm are then bitwise equal."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
