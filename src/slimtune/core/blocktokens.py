"""Tokens in a vision tower's stream: [x ; P ; E] enters a block, with P its own or what the block before made of one.

A block's own tokens take the place of those that its method had there before. The plan's carry holds, under
`tokens/<tower>`, how many each method has in the stream: they stand in this order behind the model's own prefix
tokens (class, registers) and behind those of a `Prompt`. Attention has no order, so the place is of no weight.
"""
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.insert import CHILD, Insert, Plan, hook_with
from slimtune.core.method import Builder, Method
from slimtune.core.promptsite import PromptSite, rows
from slimtune.core.sites import Site
from slimtune.errors import MethodError


def hook_stream(build: Builder, method: Method, tower: Tower) -> None:
    """Forget, at a tower's start, what a forward that raised left behind."""
    build.slot(method, Site(tower.name, None, "tokens", tower.path, tower.width, tower.width), "stream", {})
    hook_with(build.module(tower.path), _start, pre=True)


def hook_leave(build: Builder, method: Method, tower: Tower, path: str) -> None:
    """Take the tokens off behind the module at `path`."""
    part = (tower.prefix_tokens, tower.prefix_tokens)
    build.slot(method, Site(tower.name, None, "tokens", path, tower.width, tower.width, part=part), "leave", {})
    hook_with(build.module(path), _leave)


def _start(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    for slot in insert.live("stream")[:1]:
        for kind in ("tokens", "prompt"):
            insert.plan.take(f"{kind}/{slot.site.tower}")


def _span(plan: Plan, site: Site) -> tuple[int, dict[int, int]]:
    """Where our tokens start, and how many each method has."""
    assert site.part is not None
    return site.part[0] + plan.peek(f"prompt/{site.tower}", (0, 0))[1], plan.peek(f"tokens/{site.tower}", {})


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bring tokens in; where they go on from the block before, only the mask is made wider."""
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("tokens")
    if not slots:
        return None
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    start, lengths = _span(insert.plan, slots[0].site)
    if any(slot.site.role != "kept" for slot in slots):
        end = start + sum(lengths.values())
        parts = dict(zip(lengths, x[:, start:end].split(list(lengths.values()), 1), strict=True)) if lengths else {}
        for slot in slots:
            if slot.site.role == "tokens":
                parts[id(slot.method)] = rows(slot, x).expand(x.shape[0], -1, -1)
            elif slot.site.role == "ended":
                parts.pop(id(slot.method), None)
        x = torch.cat([x[:, :start], *parts.values(), x[:, end:]], 1)
        lengths = {owner: part.shape[1] for owner, part in parts.items()}
        insert.plan.put(f"tokens/{slots[0].site.tower}", lengths)
    return _call(args, kwargs, x, start, sum(lengths.values()))


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, start: int, length: int) -> Any:
    """A block's call with another x, and its mask, by position or by name, wider by `length` at `start`."""
    args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
    if isinstance(mask := kwargs.get("attention_mask"), Tensor):
        kwargs = {**kwargs, "attention_mask": _widen(mask, start, length)}
    elif len(args) > 1 and isinstance(args[1], Tensor):
        args = (args[0], _widen(args[1], start, length), *args[2:])
    return args, kwargs


def _widen(mask: Tensor, start: int, length: int) -> Tensor:
    """Every token sees the prompt, and the prompt each token that any token sees.

    Shapes: mask (B, S), or (B, 1, S, S) as booleans or as what is added to scores.
    """
    if mask.dim() not in (2, 4):
        raise MethodError(f"a visual prompt widens attention masks of two or four axes, and the block got one of "
                          f"{mask.dim()}.", "Load the model with attn_implementation='sdpa' or 'eager'.")
    opened = mask.new_full((*mask.shape[:-1], length), 0 if mask.is_floating_point() and mask.dim() == 4 else 1)
    mask = torch.cat([mask[..., :start], opened, mask[..., start:]], -1)
    if mask.dim() == 2:
        return mask
    if mask.is_floating_point():  # a bias of positions is 0 there, and what is closed stays so
        row = mask.amax(-2, True)
        row = row.masked_fill(row > torch.finfo(mask.dtype).min / 2, 0.0)
    else:
        row = mask.any(-2, True)
    return torch.cat([mask[..., :start, :], row.expand(-1, -1, length, -1), mask[..., start:, :]], -2)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Take a method's own tokens off; where it pools, the first token becomes what the head is to read."""
    insert: Insert = module._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("leave")
    if not slots:
        return None
    start, lengths = _span(insert.plan, slots[0].site)
    end = start + sum(lengths.values())
    h: Tensor = out[0] if isinstance(out, tuple) else out
    image, pool = h[:, end:], slots[-1].method.pool
    if pool == "prompt" and start == end:
        raise MethodError(f"{type(slots[-1].method).__name__}(pool='prompt') has no prompt to read at "
                          f"{slots[-1].site.path}.", "Call the whole model, or set pool='image'.")
    if pool != "original":
        pooled = {"image": image, "prompt": h[:, start:end], "image+prompt": h[:, start:]}[pool].mean(1, True)
        h = torch.cat([pooled, h[:, 1:]], 1)
    if ending := {id(slot.method) for slot in slots if slot.method.strip} & lengths.keys():
        parts = zip(lengths, h[:, start:end].split(list(lengths.values()), 1), strict=True)
        kept = {owner: part for owner, part in parts if owner not in ending}
        insert.plan.put(f"tokens/{slots[0].site.tower}", {owner: part.shape[1] for owner, part in kept.items()})
        h = torch.cat([h[:, :start], *kept.values(), image], 1)
    return (h, *out[1:]) if isinstance(out, tuple) else h


def put_tokens(build: Builder, method: Any, site: PromptSite, embed: str) -> None:
    """A slot at a block's input; its role says whether with tokens of its own."""
    slot = build.slot(method, site, "tokens", method.params(site) if site.role == "tokens" else {})
    slot.relative = (build.module(embed),)
    hook_with(build.module(site.path), _enter, pre=True)


def put_added(build: Builder, method: Any, site: PromptSite, embed: str) -> None:
    """A slot whose rows are added to a block's input."""
    slot = build.slot(method, site, "added", method.params(site))
    slot.relative = (build.module(embed),)
    hook_with(build.module(site.path), _add, pre=True)


def _add(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("added")
    if not slots:
        return None
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    for slot in slots:
        p = rows(slot, x)
        if p.shape[1] not in (1, x.shape[1]):
            raise MethodError(f"{type(slot.method).__name__} adds to {p.shape[1]} tokens, and {slot.site.path} got "
                              f"{x.shape[1]}.", "Set image_size to the size of the images, and attach no prompt of "
                              "tokens beside it.")
        x = x + p
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


HOOKS = (_start, _enter, _leave, _add)
