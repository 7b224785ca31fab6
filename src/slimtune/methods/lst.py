"""Ladder side-tuning: a thin network beside the backbone, fed by a rung from every block.

    s_0 = W_0 h_0 + b_0
    s_i = Block_i(mu_i s_{i-1} + (1 - mu_i) (W_i h_i + b_i)),    mu_i = sigmoid(alpha_i / T), alpha_i = 0
    out = W_up norm(s_N) + b_up

Source: Sung et al., 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning", arXiv 2206.06522, sections 3.2 and 3.3. The frozen head of the backbone reads out; the side
encoder's norm(s_N) is the memory of the side decoder.
"""
from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, Params, Side, Tower, affine, scalar, zeros
from slimtune.core.sideblock import linear_params
from slimtune.core.sideshape import SideSite, kept_blocks


class LST(Side):
    """The backbone runs without a graph: nothing of it is saved for backward.

    Trains S_e E + S_d D + 2 (P + w + 32 H) + N_e + N_d + (w + 1) d numbers: 3,878,712 on T5-base with 9 of 12
    blocks kept, 9,057,328 on T5-large with every second, 2,494,896 on T5-3B with the last alone.

    Of N_e and N_d blocks S_e and S_d are kept, each with a rung of P = (d + 1) w; w = d / r, f = d_ff / r,
    A = 4 w H (d_kv / r) an attention, E = A + 2 w f + 2 w + P and D = 2 A + 2 w f + 3 w + P. Other families
    have their biases, and no table of 32 H.

    blocks: those that keep a side block and a rung, counted in each tower; all by default. gate: False adds
    the rung to s instead.

    Shapes:
        h: (B, T, d); s: (B, T, d / r).
    """

    gate: bool = Field(True, description="mix by a learned gate; otherwise add")
    temperature: float = Field(0.1, gt=0, description="T of the gates")

    def kept(self, tower: Tower) -> list[int]:
        return kept_blocks(self.blocks, tower, "LST")

    def rung_params(self, site: SideSite) -> Params:
        return self.dropped_params(site) | linear_params("rung", site.shape.outer, site.shape.width)

    def dropped_params(self, site: SideSite) -> Params:
        return {"gate": zeros()} if self.gate else {}

    def rung(self, p: Bound, s: Tensor, h: Tensor) -> Tensor:
        step = affine(h, p["rung"], p["rung_bias"])
        if not self.gate:
            return s + step
        mu = (p["gate"] / self.temperature).sigmoid()
        return scalar(mu, s) * s + scalar(1 - mu, s) * step
