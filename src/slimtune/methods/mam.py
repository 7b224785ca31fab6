"""MAM adapter: a short prefix in every attention, and a scaled parallel adapter beside every feed-forward network.

    head = softmax([q P_k^T ; q k^T] / sqrt(c)) [P_v ; v];    y <- y + s (W_up ReLU(W_down x + b_down) + b_up)

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366,
section 4.6.
"""
from typing import Any, ClassVar

from pydantic import Field

from slimtune.core import Method, find


class MAM(Method):
    """The union of PrefixTuning and ScaledParallelAdapter, and attached as that.

    Trains 2 l d numbers an attention and 2 m d + m + d a feed-forward network: 27,414,528 on BART-large at l = 30,
    m = 512.
    """

    primitive: ClassVar[str] = "union"
    identity: ClassVar[bool] = False

    length: int = Field(30, ge=1, description="l, of the prefix")
    hidden: int | None = Field(None, ge=1, description="width of the prefix' reparametrisation; none by default")
    bottleneck: int = Field(512, ge=1, description="m")
    scale: float = Field(4.0, description="s")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the bottleneck, in training")

    def parts(self) -> list[Method]:
        common: dict[str, Any] = {"head": self.head, "norms": self.norms, "pooler": self.pooler, "blocks": self.blocks}
        return [find("prefix_tuning")(length=self.length, hidden=self.hidden, **common),
                find("scaled_parallel_adapter")(bottleneck=self.bottleneck, scale=self.scale, dropout=self.dropout,
                                                **common)]
