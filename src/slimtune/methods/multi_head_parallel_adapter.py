"""Multi-head parallel adapter: a small bottleneck beside every attention head, which reads the head's query.

    head_i <- head_i + s ReLU(q_i P_k,i^T) P_v,i

With q_i = x W_q,i this is ReLU(x W_down,i) W_up,i of the paper, W_down,i = W_q,i P_k,i^T. It is prefix tuning
without softmax and without gate.

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, table 1.
"""
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, KeysValues, Params, Site, normal, zeros


class MultiHeadParallelAdapter(KeysValues):
    """r numbers of bottleneck a head, added to the heads before the output projection.

    Trains 2 r d numbers an attention, as a parallel adapter of r without biases: 552,960 on BERT-base at r = 30.
    The query is read as the attention gets it, scaled; under rotary positions it is a rotated one.

    Shapes:
        key, value: (r, heads * head_dim) an attention; with an example axis (B, r, heads * head_dim).
    """

    bottleneck: int = Field(30, ge=1, description="r, of each head")
    scale: float = Field(1.0, description="s")
    init: Literal["bert", "lora"] = Field("lora", description="lora starts P_v at 0")
    composition: Literal["concat", "gate", "add", "relu"] = "relu"

    identity: ClassVar[bool] = True
    silent: ClassVar[dict[str, str]] = {r"\.key$": "the values are 0 at the start, so the first gradient stops there"}

    def starts_as_identity(self) -> bool:
        return self.init == "lora" and self.composition in ("add", "relu")

    def resting(self) -> dict[str, str]:
        return self.silent if self.starts_as_identity() else {}

    def params(self, site: Site) -> Params:
        width = site.heads * site.head_dim
        value = zeros(self.bottleneck, width) if self.init == "lora" else normal(self.bottleneck, width)
        return {"key": normal(self.bottleneck, width), "value": value}

    def keys_values(self, p: Bound) -> tuple[Tensor, Tensor]:
        return p["key"], self.scale * p["value"]
