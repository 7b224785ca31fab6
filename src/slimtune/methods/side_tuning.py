"""Side-tuning: a small network beside the backbone, blended with it at the end.

    s_0 = W_0 h_0 + b_0;   s_i = Block_i(s_{i-1}), i = 1 ... depth
    out = a h_N + (1 - a) (W_up norm(s_depth) + b_up),    a = sigmoid(alpha), alpha = 0

Source: Zhang et al., 2020, "Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks",
arXiv 1912.13503, section 3. Ours: the side network is the first `depth` blocks of the backbone, thinned, for
the paper's distilled copies of convolutional networks; in an encoder-decoder the side encoder's end is the
memory of the side decoder, and the blend is at the decoder's end.
"""
from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, Params, Side, Tower, scalar, zeros
from slimtune.core.sideshape import SideSite
from slimtune.errors import MethodError


class SideTuning(Side):
    """The backbone runs without a graph, and no rung joins it to the side network.

    Trains (d + 1) w + depth E + 2 w + (w + 1) d + 1 numbers: 372,193 on BERT-base at r = 8, depth 2.

    w = d / r, f = d_ff / r; a block of BERT's has E = 4 w (w + 1) + 2 w f + f + w + 4 w.

    Shapes:
        h: (B, T, d); s: (B, T, d / r).
    """

    depth: int = Field(2, ge=1, description="number of side blocks")

    def kept(self, tower: Tower) -> list[int]:
        if self.blocks is not None:
            raise MethodError("SideTuning has no rungs, and takes the first blocks of the backbone.",
                              "Set depth instead of blocks.")
        if self.depth > len(tower.blocks):
            raise MethodError(f"SideTuning.depth={self.depth} is more than the {tower.name} has blocks.",
                              f"It has: {len(tower.blocks)}.")
        return list(range(self.depth))

    def top_params(self, site: SideSite) -> Params:
        return super().top_params(site) | ({"blend": zeros()} if site.role == "top" else {})

    def top(self, p: Bound, s: Tensor, h: Tensor) -> Tensor:
        side = super().top(p, s, h)
        if "blend" not in p:
            return side
        a = p["blend"].sigmoid()
        return scalar(a, h) * h + scalar(1 - a, h) * side
