"""Scaled parallel adapter: a bottleneck beside the feed-forward network, times s.

    y <- y + s (W_up ReLU(W_down x + b_down) + b_up),    W_up = 0 at the start

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, table 1 and section 4.6.
"""
from typing import ClassVar, Literal

from pydantic import Field

from slimtune.core import Adapter, InitName


class ScaledParallelAdapter(Adapter):
    """The best single module of the unified view; LoRA's start makes it an identity.

    Trains m (d_in + d_out) + m + d_out numbers a site, and one more with a learned scale.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """

    bottleneck: int = Field(512, ge=1, description="m")
    form: Literal["sequential", "parallel"] = "parallel"
    scale: float = Field(4.0, description="s; the start of it when it is learned")
    init: InitName = "lora"

    identity: ClassVar[bool] = True
