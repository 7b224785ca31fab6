"""Houlsby adapters: a bottleneck with a residual after the attention and after the feed-forward network.

    y <- y + W_up GELU(W_down y + b_down) + b_up

Source: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.
"""
from typing import Literal

from slimtune.core import Activation, Adapter, InitName, Norms, Params, truncated_normal


class Houlsby(Adapter):
    """Two sequential adapters a block, with all norms trained beside them.

    Trains 2 (2 m d + m + d) numbers a block: 2,379,264 on BERT-base at m = 64, beside 38,400 in norms.
    compat="official" starts at the code's deviation of 0.001, the paper's is 0.01.

    Shapes:
        y: (..., T, d), the sub-layer's output before the residual sum.
    """

    activation: Activation = "gelu"
    init: InitName = "houlsby"
    sites: tuple[str, ...] = ("self.attn", "mlp")
    norms: Norms = "all"
    compat: Literal["paper", "official"] = "paper"

    def project_params(self, name: str, d_in: int, d_out: int) -> Params:
        if self.compat == "official":
            return {name: truncated_normal(d_out, d_in, std=0.001)}
        return super().project_params(name, d_in, d_out)
