"""Tokens in a Swin block: every window of an image sees the image's prompt, and what they make of it is averaged.

    [P_w ; X_w] = Attention([LN P ; LN X_w]) for each window w;   P' = P + mean_w P_w;   P'' = P' + MLP(LN P')

Rows are laid out image by image, so no image sees another's prompt. The prompt's rows and columns have a relative
position bias of 0 and are open in the shift mask. Patch merging reads the image alone: a prompt ends with its stage.

The prompt enters a block's attention as the keyword `prompts`, which the block passes on, and leaves it in place of
the attention's maps, so that a recomputation under gradient checkpointing sees the same values.
"""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from slimtune.core.insert import CHILD, Insert, Slot, hook_with
from slimtune.core.method import Builder
from slimtune.core.promptsite import PromptSite, rows
from slimtune.core.sites import Site, join, lookup
from slimtune.errors import MethodError

PARTS = ("layernorm_before", "attention", "attention.relative_position_bias", "dropout", "drop_path",
         "layernorm_after", "mlp")


def put_windows(build: Builder, method: Any, site: PromptSite, embed: str) -> None:
    """A slot at a block's input; its role says whether with tokens of its own."""
    block = build.module(site.path)
    missing = [part for part in PARTS if lookup(block, part) is None]
    if missing:
        raise MethodError(f"{type(method).__name__} knows windows of Swin's kind, and {build.anatomy.model_type}'s "
                          f"blocks have no {missing[0]}.", "Set location='pad'.")
    slot = build.slot(method, site, "windows", method.params(site) if site.role == "tokens" else {})
    slot.relative = (build.module(embed),)
    for part in ("attention", "attention.relative_position_bias"):
        at = Site(site.tower, site.block, "kept", join(site.path, part), site.d_in, site.d_out)
        build.slot(method, at, "window", {})
    hook_with(block, _open, pre=True)
    hook_with(block, _close)
    hook_with(block.get_submodule("attention"), _into, pre=True)
    hook_with(block.get_submodule("attention"), _out)
    hook_with(block.get_submodule("attention.relative_position_bias"), _bias)


def _live(module: nn.Module, kind: str) -> tuple[Insert, list[Slot]]:
    insert: Insert = module._modules[CHILD]  # type: ignore[assignment]
    return insert, insert.live(kind)


def _open(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The prompts of a block, by method, each (B, l, d)."""
    insert, slots = _live(block, "windows")
    if not slots:
        return None
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    if (getattr(block, "gradient_checkpointing", False) and block.training
            and getattr(checkpoint, "keywords", {}).get("use_reentrant")):
        raise MethodError("tokens in Swin's windows need gradient checkpointing with use_reentrant=False.",
                          "Call gradient_checkpointing_enable({'use_reentrant': False}), or set path='keys'.")
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    before = insert.plan.take(f"windows/{slots[0].site.tower}", {})
    parts = {id(s.method): before[id(s.method)] if s.site.role == "kept" else
             rows(s, x).expand(x.shape[0], -1, -1) for s in slots if s.site.role != "ended"}
    insert.plan.put(f"windows/{slots[0].site.tower}", parts)
    if not parts:
        return None
    prompts = torch.cat(list(parts.values()), 1)
    return args, {**kwargs, "prompts": block.layernorm_before(prompts)}  # type: ignore[operator]


def _into(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Windows with the image's prompt in front. Shapes: x (B W, n, d), prompts (B, l, d), mask (W, n, n)."""
    insert: Insert = attention._modules[CHILD]  # type: ignore[assignment]
    if "prompts" not in kwargs:
        insert.plan.take("window")  # of a forward that raised
        return None
    kwargs = dict(kwargs)
    prompts, x, mask = kwargs.pop("prompts"), args[0], args[1]
    length = prompts.shape[1]
    insert.plan.put("window", (prompts.shape[0], length))
    x = torch.cat([prompts.repeat_interleave(x.shape[0] // prompts.shape[0], 0), x], 1)
    return (x, mask if mask is None else pad(mask, (length, 0, length, 0)), *args[2:]), kwargs


def _bias(table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Any:
    insert: Insert = table._modules[CHILD]  # type: ignore[assignment]
    _, length = insert.plan.peek("window", (0, 0))
    return pad(out, (length, 0, length, 0)) if length else None


def _out(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The windows, and each image's mean of what its windows made of the prompt, (B, l, d)."""
    insert: Insert = attention._modules[CHILD]  # type: ignore[assignment]
    batch, length = insert.plan.take("window", (0, 0))
    if not length:
        return None
    y = out[0]
    return y[:, length:].contiguous(), y[:, :length].unflatten(0, (batch, -1)).mean(1)


def _close(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """What of the prompts goes on into the next block."""
    insert, slots = _live(block, "windows")
    key = f"windows/{slots[0].site.tower}" if slots else ""
    parts: dict[int, Tensor] = insert.plan.take(key, {}) if slots else {}
    if not parts:
        return None
    new = out[1].split([p.shape[1] for p in parts.values()], 1)
    onward = {id(s.method) for s in slots if getattr(s.site, "onward", False)}
    insert.plan.put(key, {owner: _rest(block, p, a) for (owner, p), a in zip(parts.items(), new, strict=True)
                          if owner in onward})
    return (out[0], None)


def _rest(block: Any, p: Tensor, attended: Tensor) -> Tensor:
    """A prompt through the block behind its attention."""
    p = p + block.drop_path(block.dropout(attended))
    return p + block.dropout(block.mlp(block.layernorm_after(p)))


HOOKS = (_open, _close, _into, _bias, _out)
