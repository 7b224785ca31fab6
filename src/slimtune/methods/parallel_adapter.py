"""Parallel adapter: a bottleneck beside the feed-forward network.

    y <- y + W_up ReLU(W_down x + b_down) + b_up

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, table 1.
"""
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.core import Activation, Add, Bound, Params, Site, bottleneck, bottleneck_params


class ParallelAdapter(Add):
    """Reads the sub-layer's input and adds to its output.

    Trains m (d_in + d_out) + m + d_out numbers a site: 7,091,712 on BERT-base at m = 384.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """

    bottleneck: int = Field(64, ge=1, description="m")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    sites: tuple[str, ...] = ("mlp",)

    identity: ClassVar[bool] = False

    def params(self, site: Site) -> Params:
        return bottleneck_params(site.d_in, self.bottleneck, site.d_out, "bert")

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y + bottleneck(p, x, self.activation, self.dropout)
