"""Scaled parallel adapter: a bottleneck beside the feed-forward network, times s.

    y <- y + s (W_up ReLU(W_down x + b_down) + b_up),    W_up = 0 at the start

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, table 1 and section 4.6.
"""
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Activation, Add, Bound, Params, Site, bottleneck, bottleneck_params, ones


class ScaledParallelAdapter(Add):
    """The best single module of the unified view; LoRA's start makes it an identity.

    Trains m (d_in + d_out) + m + d_out numbers a site, and one more with a learned scale.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """

    bottleneck: int = Field(512, ge=1, description="m")
    scale: float = Field(4.0, description="s; the start of it when it is learned")
    learned_scale: bool = Field(False, description="train one scale a site")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    sites: tuple[str, ...] = ("mlp",)

    silent: ClassVar[dict[str, str]] = {
        r"\.down(_bias)?$": "the up-projection is 0 at the start, so the first gradient stops there",
        r"\.gain$": "the bottleneck's output is 0 at the start"}

    def params(self, site: Site) -> Params:
        gain = {"gain": ones()} if self.learned_scale else {}
        return bottleneck_params(site.d_in, self.bottleneck, site.d_out, "lora") | gain

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        update = self.scale * bottleneck(p, x, self.activation, self.dropout)
        return y + (update * p["gain"][..., None, None] if self.learned_scale else update)
