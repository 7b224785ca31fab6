"""P-tuning v2: flat trained keys and values in every attention, with dropout, for classification and tagging.

    head = softmax([q P_k^T ; q k^T] / sqrt(c)) [P_v ; v],    [P_k ; P_v] = drop(E)

Source: Liu et al., 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
Tasks", arXiv 2110.07602, section 3.2.
"""
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, KeysValues, Params, Site, normal


class PTuningV2(KeysValues):
    """l pairs of keys and values an attention, N(0, 1) at the start, without a reparametrisation.

    Trains 2 l d numbers an attention: 368,640 on BERT-base at l = 20.

    Shapes:
        key, value: (l, heads * head_dim) an attention; with an example axis (B, l, heads * head_dim).
    """

    length: int = Field(20, ge=1, description="l")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="of the prefix, in training; the backbone's, in the code")

    def params(self, site: Site) -> Params:
        width = site.heads * site.head_dim
        return {"key": normal(self.length, width, std=1.0), "value": normal(self.length, width, std=1.0)}

    def keys_values(self, p: Bound) -> tuple[Tensor, Tensor]:
        drop = p.training and self.dropout > 0
        return tuple(F.dropout(p[n], self.dropout) if drop else p[n] for n in ("key", "value"))  # type: ignore[return-value]
