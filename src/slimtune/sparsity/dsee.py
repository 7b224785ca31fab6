"""DSEE's S1: the mask of the frozen weights below a low-rank and sparse update, drawn from the update.

    y = (W0 * S1) x + s (B A + S2) x,    s = alpha / r

Unstructured, two groups have a threshold each: the maps that the update does not touch (with the pooler) by |W0|, and
those that it does (query and value) by a mode:

    ABS  |s (BA + S2)|       AB  |s BA|         W  |W0|         WAB  |W0 + s BA|      WABS  |W0 + s (BA + S2)|
    NABS 1 / |s (BA + S2)|   NAB 1 / |s BA|     random

Structured, each layer loses the heads of the lowest sum over their rows of |BA + S2| of query and value (WABS adds
|W0|), and the neurons of the smallest coefficients.

Source: Chen et al., 2023, "DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language Models", arXiv
2111.00160, section 3.3, with the modes of its code.
"""
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from slimtune.core import Delta, Slot
from slimtune.core.bound import weight_at
from slimtune.core.method import key_of
from slimtune.core.support import sparse_matrix
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.allocation import global_, lowest, removed
from slimtune.sparsity.prune import Sparsity, measured
from slimtune.sparsity.structure import at_site, of_units
from slimtune.sparsity.target import denominator, oriented, targets
from slimtune.sparsity.view import View

Mode = Literal["ABS", "AB", "W", "WAB", "WABS", "NABS", "NAB", "random"]


@torch.no_grad()
def dsee_unstructured(delta: Delta, ratio: float, update_ratio: float | None = None, mode: Mode = "ABS", *,
                      pooler: bool = False, compat: Literal["paper", "official"] = "paper", seed: int = 0) -> Sparsity:
    """Mask the backbone below a DSEE delta; what it trained goes on from where it is (stage two).

    ratio: of the maps it does not update; update_ratio: of those it does, by default the same. compat="official" has
    the code's WABS, |W0 + BA + s S2|.
    Errors: MethodError for a delta without a DSEE part, an unknown mode, or a ratio that is no share.
    """
    update_ratio = ratio if update_ratio is None else update_ratio
    if mode not in SCORES:
        raise MethodError(f"DSEE has no mode '{mode}'.", f"There are: {listing(SCORES)}", suggest(mode, SCORES))
    _shares(ratio=ratio, update_ratio=update_ratio)
    slots = _slots(delta)
    view = View(delta, targets(delta, "base", pooler=pooler), seed=seed)
    rest: dict[str, Tensor] = {}
    update: dict[str, Tensor] = {}
    places: dict[str, tuple[str, slice]] = {}
    for name, target in view.targets.items():
        for site in target.sites or (None,):
            slot = None if site is None else slots.get(site.name)
            weight = target.parameter.detach() if site is None else at_site(target.parameter.detach(), site)
            part = slice(None) if site is None or site.part is None else slice(*site.part)
            key = f"{name}[{part.start}:{part.stop}]"
            places[key] = name, part
            if slot is None:
                rest[key] = weight.abs()
            else:
                update[key] = SCORES[mode](_Parts(slot, weight, compat, view.generator(slot.site.name)))
    masks = {name: torch.ones_like(t.parameter, dtype=torch.bool) for name, t in view.targets.items()}
    for key, keep in {**global_(rest, ratio), **global_(update, update_ratio)}.items():
        name, part = places[key]
        oriented(masks[name], view.targets[name])[part] = keep
    return _set(delta, masks, denominator("base", pooler), on="base", mode=mode, ratio=ratio,
                update_ratio=update_ratio, compat=compat)


@torch.no_grad()
def dsee_structured(delta: Delta, heads: int = 3, neurons: float = 0.25,
                    mode: Literal["ABS", "WABS"] = "ABS") -> Sparsity:
    """Gate away, in each layer, so many heads and a share of the neurons; `shrink` then slices them out.

    The delta is a union of DSEE and Gates, whose coefficients were trained with an l1 penalty in stage one.
    Errors: MethodError when a part is missing, a layer has no more heads than that, or neurons is no share.
    """
    _shares(neurons=neurons)
    slots, gates = _slots(delta), targets(delta, "gates")
    masks = {}
    for name, gate in gates.items():
        site, units = gate.sites[0], gate.parameter.numel()
        if site.role == "mlp.act":
            masks[name] = lowest(gate.parameter.abs(), removed(neurons, units))
            continue
        if not 0 <= heads < units:
            raise MethodError(f"{site.name} has {units} heads, and {heads} were to go.",
                              f"Prune 0 to {units - 1} of them.")
        own = [slots[s.name] for s in delta.anatomy.sites if s.name in slots and (s.tower, s.block) == (
            site.tower, site.block) and s.role in ("attn.q", "attn.v") and s.cross == site.cross]
        if not own:
            raise MethodError(f"no update of query or value says which heads of {site.name} matter.",
                              "Attach DSEE on attn.q and attn.v.")
        score = torch.stack([_of_heads(slot, delta, units, mode) for slot in own]).sum(0)
        masks[name] = lowest(score, heads).reshape(gate.parameter.shape)
    return _set(delta, masks, denominator("gates"), on="gates", mode=mode, heads=heads, neurons=neurons)


def _set(delta: Delta, masks: dict[str, Tensor], what: str, on: str, **how: Any) -> Sparsity:
    """Let the masks hold, and keep with the delta what they are."""
    delta.set_masks({**delta.masks, **masks})
    found = measured(masks, what)
    delta.info["sparsity"] = [*delta.info.get("sparsity", []), {
        **found.as_dict(), "criterion": {"name": "dsee", **how}, "on": on}]
    return found


def _shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise MethodError(f"{name}={share}: it is the share that is pruned, from 0 to below 1.",
                              "Give for example 0.5.")


def _of_heads(slot: Slot, delta: Delta, units: int, mode: str) -> Tensor:
    parts = _Parts(slot, weight_at(delta.model.get_submodule(slot.site.path), slot.site))
    total = (parts.low_rank + parts.sparse).abs() / parts.scale
    return of_units(slot.site, total + (parts.weight.abs() if mode == "WABS" else 0), units)


class _Parts:
    """One site's W0, s BA and s S2; noise: what mode "random" draws from."""

    def __init__(self, slot: Slot, weight: Tensor, compat: str = "paper", noise: torch.Generator | None = None) -> None:
        p, site = slot.bind(weight, None), slot.site
        self.weight, self.scale = weight.detach(), float(slot.method.scale)  # type: ignore[attr-defined]
        self.low_rank = self.scale * (p["B"] @ p["A"])
        self.sparse = self.scale * sparse_matrix(p["indices"], p["values"], site.d_out, site.d_in)
        self.noise = noise
        self.first = self.low_rank / self.scale if compat == "official" else self.low_rank


SCORES: dict[str, Callable[[_Parts], Tensor]] = {
    "ABS": lambda p: (p.low_rank + p.sparse).abs(), "AB": lambda p: p.low_rank.abs(), "W": lambda p: p.weight.abs(),
    "WAB": lambda p: (p.weight + p.low_rank).abs(), "WABS": lambda p: (p.weight + p.first + p.sparse).abs(),
    "NABS": lambda p: 1 / (p.low_rank + p.sparse).abs(), "NAB": lambda p: 1 / p.low_rank.abs(),
    "random": lambda p: torch.rand(p.weight.shape, generator=p.noise).to(p.weight.device)}


def _slots(delta: Delta) -> dict[str, Slot]:
    found = {slot.site.name: slot for _, slot in delta.slots if key_of(type(slot.method)) == "dsee"}
    if not found:
        raise MethodError(f"delta '{delta.name}' has no DSEE part, whose update says which weights matter.",
                          "Attach DSEE(), or prune by another criterion with prune().")
    return found
