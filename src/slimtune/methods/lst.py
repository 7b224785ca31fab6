"""Ladder side-tuning: a thin network beside the backbone, fed by a rung from every block.

    s_0 = W_0 h_0 + b_0
    s_i = Block_i(mu_i s_{i-1} + (1 - mu_i) (W_i h_i + b_i)),    mu_i = sigmoid(alpha_i / T), alpha_i = 0
    out = W_up RMSNorm(s_N) + b_up

Source: Sung et al., 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning", arXiv 2206.06522, section 3.2. The blocks start at random here: pre-norm, with as many heads
as the backbone's, every width divided by r.
"""
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, Masks, Params, Side, Site, Tower, affine, kaiming, ones, uniform, zeros
from slimtune.errors import MethodError

TEMPERATURE = 0.1


class LST(Side):
    """The backbone runs without a graph: nothing of it is saved for backward.

    Trains, with w = d / r, f = d_ff / r and i = heads (head_dim / r): (d + 1) w at the start; a block
    (d + 1) w + 1 + 4 w i + 2 w f + 2 w, and 4 w i + w more with cross-attention; w + (w + 1) d at the top.

    Shapes:
        h: (B, T, d); s: (B, T, d / r).
    """

    reduction: int = Field(8, ge=1, description="r: every width of the side network is the backbone's over r")

    def start_params(self, tower: Tower) -> Params:
        return _linear("start", tower.width, self._width(tower))

    def step_params(self, tower: Tower, site: Site, query: Site, ffn: int, cross: bool) -> Params:
        w = self._width(tower)
        inner, hidden = self._heads(query) * self._head_dim(query), max(1, ffn // self.reduction)
        params = {"gate": zeros(), **_linear("rung", tower.width, w), **_attention("self", w, inner)}
        if cross:
            params |= _attention("cross", w, inner)
        return params | {"norm_mlp": ones(w), "mlp_up": kaiming(hidden, w), "mlp_down": kaiming(w, hidden)}

    def top_params(self, tower: Tower, ends: bool) -> Params:
        w = self._width(tower)
        return {"norm_top": ones(w)} | (_linear("top", w, tower.width) if ends else {})

    def start(self, p: Bound, h: Tensor) -> Tensor:
        return affine(h, p["start"], p["start_bias"])

    def step(self, p: Bound, s: Tensor, h: Tensor, masks: Masks, causal: bool, memory: Tensor | None) -> Tensor:
        mu = (p["gate"] / TEMPERATURE).sigmoid()[..., None, None]
        s = mu * s + (1 - mu) * affine(h, p["rung"], p["rung_bias"])
        u = rms_norm(s, p["norm_self"])
        s = s + self._attend(p, "self", u, u, masks[0], causal and masks[0] is None)
        if memory is not None:
            s = s + self._attend(p, "cross", rms_norm(s, p["norm_cross"]), memory, masks[1], False)
        return s + affine(F.gelu(affine(rms_norm(s, p["norm_mlp"]), p["mlp_up"])), p["mlp_down"])

    def top(self, p: Bound, s: Tensor) -> Tensor:
        s = rms_norm(s, p["norm_top"])
        return affine(s, p["top"], p["top_bias"]) if "top" in p else s

    def _attend(self, p: Bound, kind: str, u: Tensor, memory: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        inner = p[f"{kind}_q"].shape[-2]
        heads = p.site.heads
        q, k, v = (affine(t, p[f"{kind}_{n}"]).unflatten(-1, (heads, inner // heads)).transpose(-3, -2)
                   for t, n in ((u, "q"), (memory, "k"), (memory, "v")))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return affine(out.transpose(-3, -2).flatten(-2), p[f"{kind}_o"])

    def _width(self, tower: Tower) -> int:
        if tower.width % self.reduction:
            raise MethodError(f"LST.reduction={self.reduction} does not divide the width {tower.width} of the "
                              f"{tower.name}.", "Choose a divisor of it.")
        return tower.width // self.reduction

    def _heads(self, query: Site) -> int:
        return query.d_in // query.head_dim

    def _head_dim(self, query: Site) -> int:
        return max(1, query.head_dim // self.reduction)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight, where weight may carry an example axis."""
    scale = weight if weight.dim() == 1 else weight[:, None]
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * scale


def _linear(name: str, d_in: int, d_out: int) -> Params:
    return {name: kaiming(d_out, d_in), f"{name}_bias": uniform(d_out, bound=d_in**-0.5)}


def _attention(kind: str, width: int, inner: int) -> Params:
    maps: dict[str, Any] = {f"{kind}_{n}": kaiming(inner, width) for n in "qkv"}
    return {f"norm_{kind}": ones(width), **maps, f"{kind}_o": kaiming(width, inner)}
