"""AdaptFormer: a scaled bottleneck beside the feed-forward network, which reads the residual stream.

    out = x' + MLP(LN(x')) + s (W_up drop(ReLU(W_down x' + b_down)) + b_up),    W_up = 0 at the start

Source: Chen et al., 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv
2205.13535, equations 1 to 3.
"""
from dataclasses import replace
from typing import Literal

from pydantic import Field

from slimtune.core import Adapter, Anatomy, InitName, Site


class AdaptFormer(Adapter):
    """x' is not normalised: what enters the norm before the feed-forward network.

    Trains 2 m d + m + d numbers a block: 1,189,632 on ViT-B/16 at m = 64. In a post-norm block (BERT) there is no
    norm in front, and x' is the feed-forward network's input.

    Shapes:
        x: (..., T, d), the residual stream; y: (..., T, d), the feed-forward output.
    """

    form: Literal["sequential", "parallel"] = "parallel"
    scale: float = Field(0.1, description="s")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    init: InitName = "lora"

    def where(self, anatomy: Anatomy) -> list[Site]:
        norms = {(s.tower, s.block): s.path for s in anatomy.sites if s.role == "norm.mlp"}
        return [s if s.role != "mlp" or anatomy.tower(s.tower).post_norm else
                replace(s, source=norms.get((s.tower, s.block), s.source)) for s in super().where(anatomy)]
