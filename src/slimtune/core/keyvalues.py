"""KeysValues: extra keys and values inside attention, through transformers' `AttentionInterface`.

    softmax([q p_k^T ; q k^T]) [p_v ; v] = (1 - m) softmax(q k^T) v + m softmax(q p_k^T) p_v

with m the share of the extra keys in all exponentials: prefix tuning is an attention over the prefix, added through
a gate. The other compositions are the unified view's: without the gate, and with ReLU in softmax's place.

One attention function wraps whichever implementation the model had chosen (sdpa, eager), reads the
extra keys and values from the attention module's own slots, and pads the mask. It is no cache, so it
works in training, under gradient checkpointing and in `generate` alike.
"""
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from slimtune.core.anatomy import Anatomy
from slimtune.core.bound import Bound
from slimtune.core.init import Params
from slimtune.core.insert import CHILD, Insert
from slimtune.core.method import Builder, Method
from slimtune.core.positions import prefix_bias, stand_before
from slimtune.core.sites import Site
from slimtune.errors import MethodError

PREFIX = "slimtune_"
WRAPPED = ("sdpa", "eager")


class KeysValues(Method):
    """The primitive of prefix tuning. A subclass states `params` (or `shared`) and `keys_values`.

    composition: "concat"; "gate", the same in the second form; "add", out + softmax(q p_k^T) p_v; "relu", likewise.
    positions: "apart", the text's start at 0; "before", the prefix takes the first (see positions.py).
    """

    primitive: ClassVar[str] = "tokens"
    identity: ClassVar[bool] = False
    sites: tuple[str, ...] = ("attn",)
    composition: Literal["concat", "gate", "add", "relu"] = Field("concat", description="how the extra pairs come in")
    positions: Literal["apart", "before"] = Field("apart", description="whether the prefix takes the first positions")

    def where(self, anatomy: Anatomy) -> list[Site]:
        return anatomy.select(self.sites, self.blocks, who=f"method {type(self).__name__}")

    def params(self, site: Site) -> Params:
        """What it trains at one attention."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site]) -> Params:
        """What it trains once for all attentions."""
        return {}

    def keys_values(self, p: Bound) -> tuple[Tensor, Tensor]:
        """The extra keys and values. Shapes: each (..., length, heads * head_dim)."""
        raise NotImplementedError

    def install(self, build: Builder) -> None:
        if self.positions == "before" and self.composition != "concat":
            raise MethodError(f"{type(self).__name__}: positions='before' is for composition='concat', and it is "
                              f"'{self.composition}'.", "Leave positions='apart': pairs beside take no position.")
        slots = []
        for site in self.where(build.anatomy):
            assert site.attention is not None
            module = build.module(site.attention)
            check_wraps(self, module, site)
            slots.append(build.slot(self, replace(site, path=site.attention), "kv", self.params(site)))
            wrap(module)
        if self.positions == "before":
            stand_before(self, build, slots)


def check_wraps(method: Method, module: nn.Module, site: Site) -> None:
    """Errors: MethodError for an attention module that `wrap` cannot take."""
    name = type(method).__name__
    modeling = sys.modules[type(module).__module__]
    if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise MethodError(f"{name} cannot go on {type(module).__name__} ({site.name}): this family computes its "
                          "attention itself and does not go through transformers' AttentionInterface.",
                          "Use prompt tuning, or a method that adds to a module's output.")
    config: Any = module.config
    chosen = (config._attn_implementation or "eager").removeprefix(PREFIX)
    if chosen not in WRAPPED:
        raise MethodError(f"{name} cannot wrap the attention implementation '{chosen}'.",
                          f"It wraps: {' '.join(WRAPPED)}", "Load the model with attn_implementation='sdpa'.")


def wrap(module: nn.Module) -> None:
    """Send a module's attention, and its masks, through ours; the model's choice stays readable in the name."""
    config: Any = module.config
    chosen = config._attn_implementation or "eager"
    if not chosen.startswith(PREFIX):
        register(chosen)
        config._attn_implementation_internal = PREFIX + chosen


def unwrap(config: Any) -> None:
    """Give a config the implementation it had."""
    chosen = getattr(config, "_attn_implementation", None) or ""
    if chosen.startswith(PREFIX):
        config._attn_implementation_internal = chosen.removeprefix(PREFIX)


def register(chosen: str) -> None:
    """Make the wrapper of one implementation known to transformers, with that implementation's masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PREFIX + chosen, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + chosen, ALL_MASK_ATTENTION_FUNCTIONS[chosen])


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attention with the module's extra keys and values in front.

    Shapes: query (B, H, T, c); key and value (B, K, S, c); attention_mask (B or 1, 1 or H, T, S) or None.
    """
    insert: Insert | None = module._modules.get(CHILD)  # type: ignore[assignment]
    beside = []
    for number, slot in enumerate(insert.live("kv") if insert is not None else ()):
        # a visual prompt's were made by a hook in front of the attention (see promptkeys.py)
        made = insert.plan.take(f"pair/{number}")  # type: ignore[union-attr]
        index = slot.chosen(key.shape[0])
        mine = key if index is None else key[index]
        extra = slot.method.keys_values(slot.bind(mine)) if made is None else made
        k, v = (_whole(_heads(t, slot.site, mine), key, index) for t in extra)
        if slot.method.composition != "concat":
            beside.append((slot.method.composition, k, v, key, attention_mask, kwargs.get("position_bias"), index))
            continue
        attention_mask = _mask(module, query, key, attention_mask, k.shape[2], kwargs)
        if index is not None:
            attention_mask = _closed(module, attention_mask, index, key, k.shape[2])
        if (bias := kwargs.get("position_bias")) is not None:
            front = prefix_bias(slot, query, key, k.shape[2])
            kwargs["position_bias"] = pad(bias, (k.shape[2], 0)) if front is None else torch.cat(
                [front.expand(*bias.shape[:-1], -1), bias], -1)
        key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
    out, shares = _original(module)(module, query, key, value, attention_mask, **kwargs)
    for composition, k, v, own, mask, bias, index in beside:
        new = compose(composition, module, query, k, v, out, own, mask, bias, kwargs)
        out = new if index is None else out.index_copy(0, index, new[index])
    return out, shares


def compose(composition: str, module: nn.Module, query: Tensor, k: Tensor, v: Tensor, out: Tensor, key: Tensor,
            mask: Tensor | None, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """The attention's output with the extra pairs beside it. Shapes: out (B, T, H, c); k, v (B, K, l, c)."""
    scale = kwargs.get("scaling")
    scale = query.shape[-1]**-0.5 if scale is None else scale
    k, v = (_each_query_head(t, query) for t in (k, v))
    scores = query @ k.mT * scale
    if composition == "relu":
        return out + (scores.relu() @ v).transpose(1, 2)
    extra = (scores.softmax(-1) @ v).transpose(1, 2)
    if composition == "add":
        return out + extra
    own = query @ _each_query_head(key, query).mT * scale + (0 if bias is None else bias)
    mask = _mask(module, query, key, mask, 0, kwargs)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
    gate = (scores.logsumexp(-1) - own.logsumexp(-1)).sigmoid().transpose(1, 2)[..., None]
    return (1 - gate) * out + gate * extra


def _each_query_head(t: Tensor, query: Tensor) -> Tensor:
    """Keys or values for each head of the query, where several share one."""
    return t if t.shape[1] == query.shape[1] else t.repeat_interleave(query.shape[1] // t.shape[1], 1)


def _original(module: nn.Module) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chosen = module.config._attn_implementation.removeprefix(PREFIX)  # type: ignore[union-attr]
    if chosen == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[chosen]


def _heads(t: Tensor, site: Site, key: Tensor) -> Tensor:
    """(..., l, heads * c) -> (B, heads, l, c). Windows of one image repeat its keys."""
    t = t.unflatten(-1, (site.heads, site.head_dim)).transpose(-3, -2).to(key.dtype)
    if t.dim() == 3 or t.shape[0] in (1, key.shape[0]):
        return t.expand(key.shape[0], -1, -1, -1)
    return t.repeat_interleave(key.shape[0] // t.shape[0], 0)


def _whole(t: Tensor, key: Tensor, index: Tensor | None) -> Tensor:
    """Keys or values of some rows for all of the batch; what the others get is closed to them."""
    return t if index is None else t.new_zeros(key.shape[0], *t.shape[1:]).index_copy(0, index, t)


def _closed(module: nn.Module, mask: Tensor | None, index: Tensor, key: Tensor, length: int) -> Tensor:
    """The mask with the first `length` columns closed in the rows that are not of `index`.

    Shapes: mask (B or 1, ..., length + S) or None; index (N); result (B, ..., length + S).
    """
    others = torch.ones(key.shape[0], dtype=torch.bool, device=key.device).index_fill(0, index, False)
    if mask is None:
        added = module.config._attn_implementation == PREFIX + "eager"  # type: ignore[union-attr]
        kind = {"dtype": key.dtype if added else torch.bool, "device": key.device}
        mask = torch.full((1, 1, 1, length + key.shape[2]), 0 if added else True, **kind)
    mask = mask.expand(key.shape[0], *mask.shape[1:])
    shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.cat([mask[..., :length].masked_fill(others[:, None, None, None], shut), mask[..., length:]], -1)


def _mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, length: int,
          kwargs: dict[str, Any]) -> Tensor | None:
    """The mask with `length` open columns in front; a causal pattern left to the kernel is written out."""
    if mask is not None:
        return pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    given = kwargs.get("is_causal")
    causal = given if given is not None else getattr(module, "is_causal", True)
    rows, columns = query.shape[2], key.shape[2]
    if not causal or rows == 1:
        return None
    open_ = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    if module.config._attn_implementation == PREFIX + "eager":  # type: ignore[union-attr]
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        return pad(zero.masked_fill(~open_, torch.finfo(query.dtype).min), (length, 0))[None, None]
    return pad(open_, (length, 0), value=True)[None, None]
