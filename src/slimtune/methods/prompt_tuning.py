"""Prompt tuning: trained token embeddings in front of the input.

    h_0 = [P ; embed(x)],    P: (l, d)

Source: Lester et al., 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv
2104.08691, section 2.
"""
from typing import Literal

from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, Params, Prompt, Site, normal, uniform


class PromptTuning(Prompt):
    """l token embeddings in front of the first tower's input.

    Trains l d numbers: 76,800 on T5-base at l = 100. The prompt is taken off after the last block, so pooling and
    labels see the text alone; the encoder of an encoder-decoder keeps it, and its decoder attends to it.

    Shapes:
        prompt: (l, d), or (B, l, d) with an example axis.
    """

    length: int = Field(100, ge=1, description="l")
    init: Literal["uniform", "normal"] = Field("uniform", description="U(-0.5, 0.5), or N(0, 0.02^2)")

    def params(self, site: Site) -> Params:
        shape = (self.length, site.d_out)
        return {"prompt": uniform(*shape, bound=0.5) if self.init == "uniform" else normal(*shape)}

    def tokens(self, p: Bound) -> Tensor:
        return p["prompt"]
