"""Houlsby adapters: a bottleneck with a residual after the attention and after the feed-forward network.

    y <- y + W_up GELU(W_down y + b_down) + b_up

Source: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.
"""
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from slimtune.core import Activation, Add, Bound, Params, Site, bottleneck, bottleneck_params


class Houlsby(Add):
    """Two sequential adapters a block, with all norms trained beside them.

    Trains 2 (2 m d + m + d) numbers a block: 2,379,264 on BERT-base at m = 64, beside 38,400 in norms.
    compat="official" starts at the code's deviation of 0.001, the paper's is 0.01.

    Shapes:
        y: (..., T, d), the sub-layer's output before the residual sum.
    """

    bottleneck: int = Field(64, ge=1, description="m")
    activation: Activation = "gelu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    sites: tuple[str, ...] = ("self.attn", "mlp")
    norms: Literal["none", "all", "mlp", "attn"] = "all"
    compat: Literal["paper", "official"] = "paper"

    identity: ClassVar[bool] = False

    def params(self, site: Site) -> Params:
        init = "houlsby" if self.compat == "paper" else "houlsby_official"
        return bottleneck_params(site.d_out, self.bottleneck, site.d_out, init)

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y + bottleneck(p, y, self.activation, self.dropout)
