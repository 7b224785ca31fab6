"""Prompt: extra tokens in front of a tower's input, taken off again after its last block.

A text tower gets them as input embeddings, so masks, positions and caches are made for the longer
sequence by the model itself; a tower that takes no embeddings (vision, CLIP's text) gets them behind
its class token, where its embedding module ends. The encoder of an encoder-decoder keeps them: its
decoder attends to the prompt as well.
"""
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from slimtune.core.anatomy import Anatomy, Tower
from slimtune.core.bound import Bound
from slimtune.core.init import Params
from slimtune.core.insert import CHILD, Insert, hook_with, named
from slimtune.core.method import Builder, Method
from slimtune.core.sites import Site
from slimtune.core.tokenbias import HOOKS as BIAS_HOOKS
from slimtune.core.tokenbias import widen_biases
from slimtune.errors import MethodError, SiteError, listing


class Prompt(Method):
    """The primitive of prompt tuning. A subclass states `params` and `tokens`.

    length: tokens; towers: which get a prompt, by default the first (the encoder of an encoder-decoder).
    """

    primitive: ClassVar[str] = "tokens"
    identity: ClassVar[bool] = False
    length: int = Field(100, ge=1, description="tokens of the prompt")
    towers: tuple[str, ...] | None = Field(None, description="towers that get a prompt; the first by default")

    def params(self, site: Site) -> Params:
        """What it trains at one tower, whose embeddings are `site.d_out` wide."""
        raise NotImplementedError

    def tokens(self, p: Bound) -> Tensor:
        """The prompt. Shapes: (..., length, width)."""
        raise NotImplementedError

    def where(self, anatomy: Anatomy) -> list[Tower]:
        names = [t.name for t in anatomy.towers]
        for name in self.towers or ():
            if name not in names:
                raise SiteError(f"method {type(self).__name__} asked for tower '{name}', which {anatomy.model_type} "
                                "does not have.", f"It has: {listing(names)}", "Set method.towers.")
        return [anatomy.tower(name) for name in self.towers or names[:1]]

    def install(self, build: Builder) -> None:
        towers = {t.name for t in build.anatomy.towers}
        for tower in self.where(build.anatomy):
            if tower.grid:
                raise MethodError(f"{type(self).__name__} cannot go on {build.anatomy.model_type}: its blocks see a "
                                  "grid of tokens or pixels, which has no place for tokens of the whole image.",
                                  "Use VPT, whose prompt every window sees, or a method that adds to outputs.")
            self._enter(build, tower)
            if {"encoder", "decoder"} <= towers and tower.name == "encoder":
                self._mark(build, build.anatomy.tower("decoder"), build.anatomy.tower("decoder").path, "memory")
            else:  # an encoder pools behind its last block; a decoder reshapes by its longer input first
                self._mark(build, tower, tower.path if tower.name == "decoder" else tower.blocks[-1], "strip")

    def _enter(self, build: Builder, tower: Tower) -> None:
        if tower.name in ("encoder", "decoder"):
            embed = next((s for s in build.anatomy.sites if s.tower == tower.name and s.role == "embed"), None)
            if embed is None:
                raise MethodError(f"{type(self).__name__} cannot go on the {tower.name} of {build.anatomy.model_type}: "
                                  "it has no token embeddings.", "Set method.towers to another tower.")
            site = Site(tower.name, None, "tokens", tower.path, embed.d_out, embed.d_out)
            build.slot(self, site, "prompt", self.params(site))
            hook_with(build.module(tower.path), _extend_text, pre=True)
            return
        site = Site(tower.name, None, "tokens", str(tower.entry), tower.width, tower.width,
                    part=(tower.prefix_tokens, tower.prefix_tokens))
        build.slot(self, site, "prompt", self.params(site))
        hook_with(build.module(str(tower.entry)), _extend_embedded)
        widen_biases(build, self, tower)
        self._mark(build, tower, tower.path, "mask")

    def _mark(self, build: Builder, tower: Tower, path: str, kind: str) -> None:
        """A slot without parameters: a later step of the same prompt, found and removed like any other."""
        build.slot(self, Site(tower.name, None, "tokens", path, tower.width, tower.width), kind, {})
        hook, pre = {"strip": (_strip, False), "memory": (_widen_memory, True), "mask": (_widen_mask, True)}[kind]
        hook_with(build.module(path), hook, pre)


def _prompt(insert: Insert, batch: int, like: Tensor) -> Tensor | None:
    """All live prompts of a tower, (B, p, d)."""
    parts = [slot.method.tokens(slot.bind(like)) for slot in insert.live("prompt")]
    parts = [t.expand(batch, -1, -1) if t.dim() == 2 else t for t in parts]
    return torch.cat(parts, 1).to(like.dtype) if parts else None


def _seen(call: dict[str, Any]) -> int:
    """Tokens already in the cache: zero in training and at prefill."""
    cache = call.get("cache") if call.get("cache") is not None else call.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def _extend_text(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("prompt")
    if not slots:
        return None
    call = named(tower, args, kwargs)
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = tower.get_input_embeddings()(call.pop("input_ids"))  # type: ignore[operator]
        call["input_ids"] = None
    length = sum(slot.method.length for slot in slots)
    if _seen(call) == 0:
        insert.plan.put(f"prompt/{slots[0].site.tower}", (0, length))
        prompt = _prompt(insert, embeds.shape[0], embeds)
        assert prompt is not None
        embeds = torch.cat([prompt, embeds], 1)
    call["inputs_embeds"] = embeds
    _widen(call, "attention_mask", length, 1, type(slots[0].method).__name__)
    if _seen(call) == 0:
        _widen(call, "token_type_ids", length, 0, "")
    _shift(call, length)
    return (), call


def _shift(call: dict[str, Any], length: int) -> None:
    """Positions given by the caller count behind the prompt."""
    positions = call.get("position_ids")
    if positions is not None:
        call["position_ids"] = positions + length
        if _seen(call) == 0:
            front = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
            call["position_ids"] = torch.cat([front, call["position_ids"]], 1)


def _widen(call: dict[str, Any], key: str, length: int, value: int, who: str) -> None:
    mask = call.get(key)
    if mask is None:
        return
    if mask.dim() != 2:
        raise MethodError(f"{who} needs the attention mask as (batch, tokens), and got {tuple(mask.shape)}.",
                          "Pass the tokenizer's mask; the model builds the rest itself.")
    call[key] = pad(mask, (length, 0), value=value)


def _widen_mask(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("mask")
    call = named(tower, args, kwargs)
    if not slots or call.get("attention_mask") is None:
        return None
    _widen(call, "attention_mask", sum(s.method.length for s in slots), 1, type(slots[0].method).__name__)
    return (), call


def _widen_memory(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = decoder._modules[CHILD]  # type: ignore[assignment]
    call = named(decoder, args, kwargs)
    mask, memory = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
    if not insert.live("memory") or mask is None or memory is None:
        return None
    call["encoder_attention_mask"] = pad(mask, (memory.shape[1] - mask.shape[1], 0), value=1)
    return (), call


def _extend_embedded(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    insert: Insert = entry._modules[CHILD]  # type: ignore[assignment]
    hidden = out[0] if isinstance(out, tuple) else out
    prompt = _prompt(insert, hidden.shape[0], hidden)
    if prompt is None:
        return None
    site = insert.live("prompt")[0].site
    assert site.part is not None
    at = site.part[0]
    insert.plan.put(f"prompt/{site.tower}", (at, prompt.shape[1]))
    hidden = torch.cat([hidden[:, :at], prompt, hidden[:, at:]], 1)
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _strip(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("strip")
    found = insert.plan.take(f"prompt/{slots[0].site.tower}") if slots else None
    if found is None:
        return None
    at, length = found
    whole = out if not isinstance(out, (tuple, Tensor)) else None  # a decoder's ModelOutput
    hidden = whole.last_hidden_state if whole is not None else out[0] if isinstance(out, tuple) else out
    hidden = torch.cat([hidden[:, :at], hidden[:, at + length:]], 1) if at else hidden[:, length:]
    if whole is not None:
        whole["last_hidden_state"] = hidden
        return whole
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


HOOKS = (_extend_text, _extend_embedded, _widen_mask, _widen_memory, _strip, *BIAS_HOOKS)
