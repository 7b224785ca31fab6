"""RepAdapter: linear adapters behind the norms, which merge into the projections that follow.

    y <- y + s (W_up (W_down y + b_down) + b_up),    W_up in g groups, 0 at the start

Source: Luo et al., 2023, "Towards Efficient Visual Adaption via Structural Re-parameterization", arXiv 2302.08106,
equations 4 to 9.
"""
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Params, Site, affine, vector, xavier, zeros
from slimtune.errors import MethodError

FOLLOW = {"norm.attn": ("attn.q", "attn.k", "attn.v"), "norm.mlp": ("mlp.up", "mlp.gate")}


class RepAdapter(Add):
    """Before the attention and before the feed-forward network, of pre-norm blocks.

    Trains m d + m + m d / g + d numbers a norm: 239,808 on ViT-B/16 at m = 8, g = 2.

    Shapes:
        y: (..., T, d), the norm's output; down: (m, d); up: (d, m / g), group by group.
    """

    bottleneck: int = Field(8, ge=1, description="m")
    groups: int = Field(2, ge=1, description="g")
    scale: float = Field(1.0, description="s")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    sites: tuple[str, ...] = ("norm.attn", "norm.mlp")

    silent: ClassVar[dict[str, str]] = {r"\.down(_bias)?$": "W_up is 0 at the start, so the first gradient stops there"}

    def where(self, anatomy: Anatomy) -> list[Site]:
        chosen = super().where(anatomy)
        for site in chosen:
            if site.role not in FOLLOW or anatomy.tower(site.tower).post_norm:
                raise MethodError(f"RepAdapter cannot go on {site.name}: it stands between a norm and the projections "
                                  "that follow it, in pre-norm blocks.", "Its sites are norm.attn and norm.mlp.")
        return chosen

    def params(self, site: Site) -> Params:
        d, m, g = site.d_out, self.bottleneck, self.groups
        if m % g or d % g:
            raise MethodError(f"RepAdapter.groups={g} divides not both the bottleneck {m} and the width {d}.",
                              "Choose a divisor of both.")
        return {"down": xavier(m, d, fan_in=d, fan_out=m), "down_bias": zeros(m), "up": zeros(d, m // g),
                "up_bias": zeros(d)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        h = affine(y, p["down"], p["down_bias"])
        if p.training and self.dropout:
            h = F.dropout(h, self.dropout)
        return y + self.scale * (affine(h, self._up(p)) + vector(p["up_bias"], y))

    def _up(self, p: Bound) -> Tensor:
        """W_up as one matrix, (d, m): blocks on its diagonal."""
        up, g = p["up"], self.groups
        wide = up.new_zeros(*up.shape[:-1], self.bottleneck)
        rows, columns = up.shape[-2] // g, self.bottleneck // g
        for i in range(g):
            wide[..., i * rows:(i + 1) * rows, i * columns:(i + 1) * columns] = up[..., i * rows:(i + 1) * rows, :]
        return wide

    def merges_into(self, site: Site, anatomy: Anatomy) -> list[Site]:
        return [s for s in anatomy.sites if s.tower == site.tower and s.block == site.block and not s.cross
                and s.role in FOLLOW[site.role]]

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W (I + s W_up W_down) and b + s W (W_up b_down + b_up), of a projection that follows."""
        up = self._up(p)
        shift = self.scale * weight @ (up @ p["down_bias"] + p["up_bias"])
        return weight + self.scale * weight @ up @ p["down"], shift if bias is None else bias + shift
