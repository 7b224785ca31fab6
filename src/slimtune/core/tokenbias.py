"""Extra tokens in a tower whose attention has a bias for each pair of tokens, made from the image's grid (BEiT).

    [b_xx 0 b_xE]      x the class token, E the patches, P the extra tokens behind the class token:
    [ 0   0   0 ]      P sees all tokens and all tokens see P, at a bias of 0
    [b_Ex 0 b_EE]
"""
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.insert import CHILD, Insert, hook_with, named
from slimtune.core.sites import Site

if TYPE_CHECKING:
    from slimtune.core.method import Builder, Method


def widen_biases(build: "Builder", method: "Method", tower: Tower) -> None:
    """Let a tower's position biases have a row and a column for each extra token behind its prefix tokens.

    How many there are is read from each call, `dim_size`: under gradient checkpointing it is called again, when the
    prompt has left the stream.
    """
    for path in tower.biases:
        site = Site(tower.name, None, "bias", path, 0, 0, part=(tower.prefix_tokens, tower.prefix_tokens))
        build.slot(method, site, "bias", {})
        hook_with(build.module(path), _plain, pre=True)
        hook_with(build.module(path), _widen)


def _plain(bias: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without the resize to the number of tokens, which is that of the grid already but for the extra ones."""
    insert: Insert = bias._modules[CHILD]  # type: ignore[assignment]
    call = named(bias, args, kwargs)
    return ((), {**call, "interpolate_pos_encoding": False}) if insert.live("bias") else None


def _widen(bias: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
    """Shapes: out (1, H, n, n) -> (1, H, n + l, n + l)."""
    insert: Insert = bias._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("bias")
    length = kwargs["dim_size"] - out.shape[-1] if slots else 0
    if not length:
        return None
    at = slots[0].site.part[0]  # type: ignore[index]
    out = torch.cat([out[..., :at], out.new_zeros(*out.shape[:-1], length), out[..., at:]], -1)
    return torch.cat([out[..., :at, :], out.new_zeros(*out.shape[:-2], length, out.shape[-1]), out[..., at:, :]], -2)


HOOKS = (_plain, _widen)
