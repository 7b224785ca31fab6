"""Parallel adapter: a bottleneck beside the feed-forward network.

    y <- y + W_up ReLU(W_down x + b_down) + b_up

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, table 1.
"""
from typing import Literal

from slimtune.core import Adapter


class ParallelAdapter(Adapter):
    """Reads the sub-layer's input and adds to its output; with sites=("self.attn",) it is beside the attention.

    Trains m (d_in + d_out) + m + d_out numbers a site: 7,091,712 on BERT-base at m = 384.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """

    form: Literal["sequential", "parallel"] = "parallel"
