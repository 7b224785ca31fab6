"""Merging: each site's weight and bias with the delta folded in, accumulated in float32, rounded once."""
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimtune.core.insert import Slot
from slimtune.core.sites import Site
from slimtune.errors import DeltaError, MethodError

if TYPE_CHECKING:
    from slimtune.core.delta import Delta


@torch.no_grad()
def merged(delta: "Delta", zeros: str | None = None) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, parameter name, new value) of every tensor that the delta changes; the base is not touched.

    Errors: MethodError for a method that is no change of weights, or a weight of 8 bits and fewer; DeltaError for
    masks on the weights it changes when `zeros` is not said.
    """
    work: dict[str, tuple[nn.Module, Tensor, Tensor | None]] = {}
    ordered = sorted(delta.slots, key=lambda item: item[1].site.at == "input")  # inputs are scaled last
    for _, slot in ordered:
        fold = getattr(slot.method, "fold", None)
        if fold is None:
            raise MethodError(f"{type(slot.method).__name__} cannot be merged: it is no change of the backbone's "
                              "weights.", "Keep it attached, or export the model with it.")
        for site in slot.method.merges_into(slot.site, delta.anatomy):
            if site.path not in work:
                work[site.path] = _start(delta.model.get_submodule(site.path), site.path)
            module, weight, bias = work[site.path]
            host = delta.model.get_submodule(slot.site.path)
            work[site.path] = (module, *_fold_slot(slot, host, site, weight, bias))
    changes = [change for module, weight, bias in work.values() for change in _finish(module, weight, bias)]
    return _with_zeros(delta, zeros, changes)


def _with_zeros(delta: "Delta", zeros: str | None,
                changes: list[tuple[nn.Module, str, Tensor]]) -> list[tuple[nn.Module, str, Tensor]]:
    """The changes, with the zeros of a masked backbone kept if that is wanted."""
    masks = {(id(module), name): delta.masks[own.key] for own in delta.owned if own.key in delta.masks
             for module, name in own.places}
    if zeros is None and any((id(module), name) in masks for module, name, _ in changes):
        raise DeltaError(f"delta '{delta.name}' masks weights that it changes; merged, they would be dense.",
                         "Call merge(zeros='fill') for m * W + dW, as it runs now, or merge(zeros='keep') for "
                         "m * (W + dW); or keep it attached.")
    if zeros == "keep":
        for module, name, value in changes:
            if (mask := masks.get((id(module), name))) is not None:
                value.masked_fill_(~mask, 0)
    return changes


def _start(module: nn.Module, path: str) -> tuple[nn.Module, Tensor, Tensor | None]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise MethodError(f"{path} has no weight to merge into.", "Keep the delta attached.")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise MethodError(f"{path} is quantised ({weight.dtype}); merging would lose the delta in rounding.",
                          "Merge into the full-precision model, then quantise.")
    bias = getattr(module, "bias", None)
    return module, wide(weight), None if bias is None else wide(bias)


def wide(value: Tensor) -> Tensor:
    """A copy in float32, or in float64 where it was."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _fold_slot(slot: Slot, host: nn.Module, site: Site, weight: Tensor,
               bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if site.source is not None:
        raise MethodError(f"{type(slot.method).__name__} at {site.name} cannot be merged: between the sub-layer's "
                          "input, which it reads, and its output is more than one linear map.",
                          "Keep it attached, or choose linear sites, such as attn.q or mlp.down.")
    view = weight.mT if site.transposed else weight
    rows = slice(*site.part) if site.part is not None else slice(None)
    p = slot.bind(weight, host)
    new_weight, new_bias = slot.method.fold(p, view[rows], None if bias is None else bias[rows])
    view[rows] = new_weight
    if new_bias is not None:
        if bias is None:
            bias = torch.zeros(view.shape[0], dtype=weight.dtype, device=weight.device)
        bias[rows] = new_bias
    return weight, bias


def _finish(module: nn.Module, weight: Tensor, bias: Tensor | None) -> list[tuple[nn.Module, str, Tensor]]:
    dtype = module.weight.dtype  # type: ignore[union-attr]
    changes: list[tuple[nn.Module, str, Tensor]] = [(module, "weight", weight.to(dtype))]  # type: ignore[arg-type]
    return changes if bias is None else [*changes, (module, "bias", bias.to(dtype))]  # type: ignore[arg-type]
