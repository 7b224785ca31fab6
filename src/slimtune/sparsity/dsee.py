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
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from slimtune.core import Delta, Site, Slot
from slimtune.core.bound import weight_at
from slimtune.core.method import key_of
from slimtune.core.support import sparse_matrix
from slimtune.errors import MethodError
from slimtune.sparsity.allocation import lowest, removed
from slimtune.sparsity.prune import Sparsity, measured
from slimtune.sparsity.structure import of_units
from slimtune.sparsity.target import Target, targets

Mode = Literal["ABS", "AB", "W", "WAB", "WABS", "NABS", "NAB", "random"]


@torch.no_grad()
def dsee_unstructured(delta: Delta, ratio: float, update_ratio: float | None = None, mode: Mode = "ABS", *,
                      pooler: bool = False, compat: Literal["paper", "official"] = "paper", seed: int = 0) -> Sparsity:
    """Mask the backbone below a DSEE delta; what it trained goes on from where it is (stage two).

    ratio: of the maps it does not update; update_ratio: of those it does, by default the same. compat="official" has
    the code's WABS, |W0 + BA + s S2|.
    Errors: MethodError for a delta without a DSEE part.
    """
    slots = _slots(delta)
    found = targets(delta, "base", pooler=pooler)
    apart: dict[str, dict[tuple[str, tuple[int, int] | None], Tensor]] = {"rest": {}, "update": {}}
    for name, target in found.items():
        for site in target.sites or (None,):
            slot = None if site is None else slots.get(site.name)
            weight = target.parameter if site is None else _weight(target, site)
            score = weight.abs() if slot is None else SCORES[mode](_Parts(slot, weight, compat, seed))
            apart["rest" if slot is None else "update"][name, None if site is None else site.part] = score
    masks = {name: torch.ones(_shape(t), dtype=torch.bool) for name, t in found.items()}
    for group, share in (("rest", ratio), ("update", ratio if update_ratio is None else update_ratio)):
        scores = apart[group]
        flat = torch.cat([s.reshape(-1).float() for s in scores.values()])
        keep = lowest(flat, removed(share, flat.numel())).split([s.numel() for s in scores.values()])
        for ((name, part), score), own in zip(scores.items(), keep, strict=True):
            masks[name][slice(*part) if part else slice(None)] = own.reshape(score.shape).cpu()
    masks = {name: m.mT.contiguous() if found[name].transposed else m for name, m in masks.items()}
    delta.set_masks({**delta.masks, **masks})
    return measured(masks, "base+pooler" if pooler else "base")


@torch.no_grad()
def dsee_structured(delta: Delta, heads: int = 3, neurons: float = 0.25,
                    mode: Literal["ABS", "WABS"] = "ABS") -> Sparsity:
    """Gate away, in each layer, so many heads and a share of the neurons; `shrink` then slices them out.

    The delta is a union of DSEE and Gates, whose coefficients were trained with an l1 penalty in stage one.
    Errors: MethodError when a part is missing, or a layer has no more heads than that.
    """
    slots, gates = _slots(delta), targets(delta, "gates")
    masks = {}
    for name, gate in gates.items():
        site, units = gate.sites[0], gate.parameter.numel()
        if site.role == "mlp.act":
            masks[name] = lowest(gate.parameter.abs(), removed(neurons, units))
            continue
        if heads >= units:
            raise MethodError(f"{site.name} has {units} heads, and {heads} were to go.", "Prune fewer.")
        own = [slots[s.name] for s in delta.anatomy.sites if s.name in slots and (s.tower, s.block) == (
            site.tower, site.block) and s.role in ("attn.q", "attn.v") and s.cross == site.cross]
        if not own:
            raise MethodError(f"no update of query or value says which heads of {site.name} matter.",
                              "Attach DSEE on attn.q and attn.v.")
        score = sum((_of_heads(slot, delta, units, mode) for slot in own), torch.zeros(units))
        masks[name] = lowest(score, heads).reshape(gate.parameter.shape)
    delta.set_masks({**delta.masks, **masks})
    return measured(masks, "gates")


def _of_heads(slot: Slot, delta: Delta, units: int, mode: str) -> Tensor:
    parts = _Parts(slot, weight_at(delta.model.get_submodule(slot.site.path), slot.site), "paper", 0)
    total = (parts.low_rank + parts.sparse).abs() / parts.scale
    return of_units(slot.site, total + (parts.weight.abs() if mode == "WABS" else 0), units)


class _Parts:
    """One site's W0, s BA and s S2."""

    def __init__(self, slot: Slot, weight: Tensor, compat: str, seed: int) -> None:
        p, site = slot.bind(weight, None), slot.site
        self.weight, self.scale = weight.detach(), float(slot.method.scale)  # type: ignore[attr-defined]
        self.low_rank = self.scale * (p["B"] @ p["A"])
        self.sparse = self.scale * sparse_matrix(p["indices"], p["values"], site.d_out, site.d_in)
        self.noise = torch.Generator().manual_seed(seed + sum(map(ord, site.name)))
        self.first = self.low_rank / self.scale if compat == "official" else self.low_rank


SCORES: dict[str, Callable[[_Parts], Tensor]] = {
    "ABS": lambda p: (p.low_rank + p.sparse).abs(), "AB": lambda p: p.low_rank.abs(), "W": lambda p: p.weight.abs(),
    "WAB": lambda p: (p.weight + p.low_rank).abs(), "WABS": lambda p: (p.weight + p.first + p.sparse).abs(),
    "NABS": lambda p: 1 / (p.low_rank + p.sparse).abs(), "NAB": lambda p: 1 / p.low_rank.abs(),
    "random": lambda p: torch.rand(p.weight.shape, generator=p.noise)}


def _slots(delta: Delta) -> dict[str, Slot]:
    found = {slot.site.name: slot for _, slot in delta.slots if key_of(type(slot.method)) == "dsee"}
    if not found:
        raise MethodError(f"delta '{delta.name}' has no DSEE part, whose update says which weights matter.",
                          "Attach DSEE(), or prune by another criterion with prune().")
    return found


def _weight(target: Target, site: Site) -> Tensor:
    """The site's rows of the target, (d_out, d_in)."""
    view = target.parameter.detach()
    view = view.mT if target.transposed else view
    return view if site.part is None else view[slice(*site.part)]


def _shape(target: Target) -> tuple[int, ...]:
    shape = tuple(target.parameter.shape)
    return shape[::-1] if target.transposed else shape


def flops_saved(heads: float, neurons: float, tokens: int, width: int = 768, inner: int = 3072) -> float:
    """The share of a layer's FLOPs that goes with shares of its heads and neurons.

    Example:
        >>> round(flops_saved(3 / 12, 0.25, 128), 4), round(flops_saved(3 / 12, 0.4, 128), 3)
        (0.25, 0.347)
    """
    attention, network = 4 * width**2 + 2 * tokens * width, 2 * width * inner
    return math.fsum((heads * attention, neurons * network)) / (attention + network)
