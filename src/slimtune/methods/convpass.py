"""Convpass: a convolution over the image's patches beside attention and feed-forward network.

    y <- y + s W_up drop(g(conv(g(W_down x + b_down)))) + b_up,    g QuickGELU, conv 3 x 3

The patches are laid out as their image; class tokens are images of one patch each.

Source: Jie and Deng, 2022, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv 2207.07039,
equations 4 to 6.
"""
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import ACTIVATIONS, Add, Anatomy, Bound, Init, Params, Site, affine, xavier, zeros
from slimtune.errors import MethodError


class Convpass(Add):
    """Reads what the sub-layer reads, behind its norm; the convolution starts as the identity, W_up as 0.

    Trains (2 h + 1) d + 9 h^2 + 2 h numbers a sub-layer: 327,552 on ViT-B/16 at h = 8.

    Shapes:
        x: (B, T, d), with T the class tokens and a square of patches; y: (B, T, d); conv: (h, h, 3, 3).
    """

    bottleneck: int = Field(8, ge=1, description="h")
    scale: float = Field(1.0, description="s")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="before W_up, in training")
    sites: tuple[str, ...] = ("vision.attn", "vision.mlp")

    silent: ClassVar[dict[str, str]] = {
        r"\.(down|conv)(_bias)?$": "W_up is 0 at the start, so the first gradient stops there"}

    def where(self, anatomy: Anatomy) -> list[Site]:
        if all(tower.name != "vision" for tower in anatomy.towers):
            raise MethodError(f"Convpass cannot go on {anatomy.model_type}: its tokens are no image.",
                              "Use an adapter, such as ParallelAdapter.")
        return [replace(s, prefix=anatomy.tower(s.tower).prefix_tokens) for s in super().where(anatomy)]

    def params(self, site: Site) -> Params:
        h = self.bottleneck
        return {"down": xavier(h, site.d_in, fan_in=site.d_in, fan_out=h), "down_bias": zeros(h),
                "conv": Init((h, h, 3, 3), _centre), "conv_bias": zeros(h),
                "up": zeros(site.d_out, h), "up_bias": zeros(site.d_out)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        act = ACTIVATIONS["quick_gelu"]
        h = act(affine(x, p["down"], p["down_bias"]))
        h = act(self._conv(p, h.flatten(1, -2)).view(h.shape))
        if p.training and self.dropout:
            h = F.dropout(h, self.dropout)
        return y + self.scale * affine(h, p["up"], p["up_bias"])

    def _conv(self, p: Bound, h: Tensor) -> Tensor:
        """The convolution of the patches, and its centre for class tokens. Shapes: h (B, T, h)."""
        first, patches = h[:, :p.site.prefix], h[:, p.site.prefix:]
        side = round(patches.shape[1]**0.5)
        if side * side != patches.shape[1]:
            raise MethodError(f"Convpass: {patches.shape[1]} patches behind {p.site.prefix} tokens make no square.",
                              "Give square images, and no prompt tokens beside it.")
        shifted = F.unfold(patches.mT.unflatten(-1, (side, side)), 3, padding=1).mT        # (B, side^2, 9 h)
        out = affine(shifted, p["conv"].flatten(-3), p["conv_bias"])
        return torch.cat([affine(first, p["conv"][..., 1, 1], p["conv_bias"]), out], 1)


def _centre(t: Tensor, generator: torch.Generator) -> None:
    t.zero_()
    t[:, :, 1, 1] = torch.eye(t.shape[0])
