"""A thin block of the same class as a backbone's: its tensors and its forward pass.

    pre-norm:   s <- s + f(norm(s))        post-norm:   s <- norm(s + f(s))

for f self-attention, cross-attention where the backbone has it, and the feed-forward network, as `Shape` says.
"""
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.core.affine import affine, vector
from slimtune.core.bound import Bound, cast
from slimtune.core.init import Init, Params, kaiming, normal, ones, uniform, zeros
from slimtune.core.sideshape import Heads, Shape

Masks: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A block's mask for its self-attention and for its cross-attention."""


# parameters


def block_params(shape: Shape, table: bool) -> Params:
    """A block's tensors at a random start: `nn.Linear`'s own, norms at 1 and 0, a table N(0, 1 / d)."""
    w, params = shape.width, {}
    for kind, a in shape.attention.items():
        params |= norm_params(shape, f"norm_{kind}")
        params |= linear_params(f"{kind}_q", w, a.heads * a.width, shape.biases)
        params |= linear_params(f"{kind}_k", w, a.keys * a.width, shape.biases)
        params |= linear_params(f"{kind}_v", w, a.keys * a.width, shape.biases)
        params |= linear_params(f"{kind}_o", a.heads * a.width, w, shape.biases)
    params |= norm_params(shape, "norm_mlp") | linear_params("mlp_up", w, shape.hidden, shape.biases)
    if shape.gated:
        params |= linear_params("mlp_gate", w, shape.hidden, shape.biases)
    params |= linear_params("mlp_down", shape.hidden, w, shape.biases)
    if table and shape.table is not None:
        params["table"] = normal(shape.table[0], shape.attention["self"].heads, std=shape.outer**-0.5)
    return params


def linear_params(name: str, d_in: int, d_out: int, biases: frozenset[str] | None = None) -> Params:
    """A linear map's weight, and its bias if it is among `biases`; always without them."""
    weight: dict[str, Init] = {name: kaiming(d_out, d_in)}
    return weight if biases is not None and name not in biases else {
        **weight, f"{name}_bias": uniform(d_out, bound=d_in**-0.5)}


def norm_params(shape: Shape, name: str) -> Params:
    weight: dict[str, Init] = {name: ones(shape.width)}
    return weight | {f"{name}_bias": zeros(shape.width)} if shape.norms[name].bias else weight


# forward


def side_block(p: Bound, s: Tensor, masks: Masks, memory: Tensor | None, bias: Tensor | None,
               dropout: float) -> Tensor:
    """One block. Shapes: s (B, T, w), memory (B, S, w), masks as `scaled_dot_product_attention` takes them,
    bias (1 or B, H, T, T), the relative positions' part of the scores."""
    shape: Shape = p.site.shape  # type: ignore[attr-defined]
    rate = dropout if p.training else 0.0
    s = _residual(p, shape, "self", s, rate, lambda u: attend(p, "self", u, u, masks[0], bias, shape.causal, rate))
    if memory is not None:
        s = _residual(p, shape, "cross", s, rate,
                      lambda u: attend(p, "cross", u, memory, masks[1], None, False, rate))
    return _residual(p, shape, "mlp", s, rate, lambda u: _feed_forward(p, shape, u, rate))


def _residual(p: Bound, shape: Shape, kind: str, s: Tensor, rate: float, f: Callable[[Tensor], Tensor]) -> Tensor:
    if shape.post_norm:
        return norm(p, f"norm_{kind}", s + drop(f(s), rate))
    return s + drop(f(norm(p, f"norm_{kind}", s)), rate)


def drop(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


def norm(p: Bound, name: str, x: Tensor) -> Tensor:
    """A norm of the backbone's kind, whose weight and bias may carry an example axis."""
    kind = p.site.shape.norms[name]  # type: ignore[attr-defined]
    weight, bias = p[name], p[f"{name}_bias"] if kind.bias else None
    if weight.dim() == 1 and (bias is None or bias.dim() == 1):
        return (F.rms_norm(x, x.shape[-1:], cast(weight, x.dtype), kind.eps) if kind.rms
                else F.layer_norm(x, x.shape[-1:], weight, bias, kind.eps))
    plain = F.rms_norm(x, x.shape[-1:], eps=kind.eps) if kind.rms else F.layer_norm(x, x.shape[-1:], eps=kind.eps)
    y = plain * vector(weight, x)
    return y if bias is None else y + vector(bias, x)


def linear(p: Bound, name: str, x: Tensor) -> Tensor:
    return affine(x, p[name], p.values.get(f"{name}_bias"))


def attend(p: Bound, kind: str, u: Tensor, memory: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool,
           rate: float) -> Tensor:
    """Attention of u to memory. Shapes: u (B, T, w), memory (B, S, w) -> (B, T, w)."""
    a: Heads = p.site.shape.attention[kind]  # type: ignore[attr-defined]
    q = linear(p, f"{kind}_q", u).unflatten(-1, (a.heads, a.width)).transpose(-3, -2)
    k, v = (linear(p, f"{kind}_{n}", memory).unflatten(-1, (a.keys, a.width)).transpose(-3, -2) for n in "kv")
    if a.keys != a.heads:
        k, v = (t.repeat_interleave(a.heads // a.keys, -3) for t in (k, v))
    if bias is not None:
        mask = _onto(bias, mask, causal)
    out = F.scaled_dot_product_attention(q, k, v, mask, rate, causal and mask is None, scale=a.scale)
    return linear(p, f"{kind}_o", out.transpose(-3, -2).flatten(-2))


def _feed_forward(p: Bound, shape: Shape, u: Tensor, rate: float) -> Tensor:
    act = p.host.get_submodule(shape.act) if shape.act and p.host is not None else F.gelu
    up = linear(p, "mlp_up", u)
    up = act(linear(p, "mlp_gate", u)) * up if shape.gated else act(up)
    return linear(p, "mlp_down", drop(up, rate))


def relative_bias(p: Bound, queries: int, keys: int) -> Tensor:
    """T5's bias by distance. Shapes: table (buckets, H) or (B, buckets, H) -> (1 or B, H, queries, keys)."""
    shape: Shape = p.site.shape  # type: ignore[attr-defined]
    table = p["table"]
    assert shape.table is not None
    number, largest = shape.table
    far = torch.arange(keys, device=table.device) - torch.arange(queries, device=table.device)[:, None]
    values = table[..., buckets(far, number, largest, not shape.causal), :].movedim(-1, -3)
    return values if values.dim() == 4 else values[None]


def buckets(distance: Tensor, number: int, largest: int, both: bool) -> Tensor:
    """The bucket of key minus query: one for each small distance, then ever wider ones (Raffel et al., 2020).

    both: half of the buckets are for keys behind the query; otherwise these share the first.
    """
    behind = 0
    if both:
        number //= 2
        behind, distance = (distance > 0).long() * number, distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = number // 2
    ratio = (distance.clamp_min(1).float() / exact).log() / math.log(largest / exact)
    wide = (exact + (ratio * (number - exact)).long()).clamp_max(number - 1)
    return behind + torch.where(distance < exact, distance, wide)


def _onto(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The mask as an additive float, with the bias in it."""
    if mask is None:
        if not causal:
            return bias
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
