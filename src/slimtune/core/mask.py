"""Masks: which weights of a delta, and of the backbone below it, live.

    W <- m * W,    m in {0, 1}^shape(W),    sparsity s = 1 - |m|_0 / |m|

What does not live is 0 in the tensor itself, so that no forward pays for the mask. A tensor of the backbone that the
delta does not train is replaced by its masked copy while the delta is active: a pointer, as for trained ones. Files
hold a mask as bits, a masked tensor as the values that live, and of a masked tensor of the backbone the bits alone.
"""
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.bits import living, pack, spread, unpack
from slimtune.core.insert import LOCK
from slimtune.core.switch import set_active
from slimtune.core.unfreeze import Owned, base_parameters, is_frozen_kind, places_of
from slimtune.errors import DeltaError, suggest

if TYPE_CHECKING:
    from slimtune.core.delta import Delta

PREFIX = "mask."
"""Before a tensor's name, in a file: the bits of its mask."""


@torch.no_grad()
def set_masks(delta: "Delta", masks: Mapping[str, Tensor]) -> None:
    """Let these masks, and no others, hold; see Delta.set_masks. An open route keeps the backbone that it reads."""
    with LOCK:
        base = _checked(delta, masks)
        root, before = delta.root, (delta.root.plan.active, delta.root.plan.weights)
        swaps = delta.active and (_pruned(delta) or any(name in base for name in masks))
        if swaps:  # off and on by the switch, which keeps routes and the order of deltas
            set_active(root, ())
        try:
            delta.owned = [own for own in delta.owned if own.group != "pruned"]
            _prune(delta, {name: mask for name, mask in masks.items() if name in base}, base)
            tensors = {**base, **delta.tensors()}
            delta.masks = {name: mask.detach().to(tensors[name].device) for name, mask in masks.items()}
            apply_masks(delta)
        finally:
            if swaps:
                set_active(root, *before)


def _checked(delta: "Delta", masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """What of the backbone can be masked. Errors: DeltaError; see Delta.set_masks."""
    trained = {own.path for own in delta.owned if own.group != "pruned"}
    tensors = delta.tensors()
    base = {name: p for name, p in base_places(delta).items() if name.removeprefix("own.") not in trained}
    for name, mask in masks.items():
        known = tensors.get(name, base.get(name))
        if known is None:
            names = [*tensors, *base]
            raise DeltaError(f"delta '{delta.name}': there is no tensor '{name}' to mask.",
                             suggest(name, names) or f"There are {len(names)}, such as {names[0]}.")
        if mask.dtype != torch.bool or mask.shape != known.shape or is_frozen_kind(known):
            raise DeltaError(f"delta '{delta.name}': the mask of {name} is {mask.dtype} {tuple(mask.shape)}; that "
                             f"is {known.dtype} {tuple(known.shape)}.", "Give booleans of the tensor's shape.")
    if delta.merged:
        raise DeltaError(f"delta '{delta.name}' is merged.", "Call unmerge() first.")
    return base


def _prune(delta: "Delta", masks: Mapping[str, Tensor], base: Mapping[str, nn.Parameter]) -> None:
    """Own masked copies of the backbone's tensors."""
    standing = base_parameters(delta.model)  # an active delta may train what this one masks
    places = places_of(delta.model, {id(standing[name.removeprefix("own.")]) for name in masks})
    for name, mask in masks.items():
        path, parameter = name.removeprefix("own."), base[name]
        value = nn.Parameter(parameter.detach().masked_fill(~mask.to(parameter.device), 0), requires_grad=False)
        delta.owned.append(Owned(path, "pruned", parameter, value, places[id(standing[path])]))


def base_places(delta: "Delta") -> dict[str, nn.Parameter]:
    """The backbone's own tensors, as they are without any delta, by their names of state `own.<path>`."""
    swapped = {id(o.value): o.base for d in (*delta.root.deltas.values(), delta) for o in d.owned}
    return {f"own.{path}": swapped.get(id(p), p) for path, p in base_parameters(delta.model).items()}


def _masked(delta: "Delta") -> Iterator[tuple[nn.Parameter, Tensor]]:
    if not delta.masks:
        return
    tensors = delta.tensors()
    for name, mask in delta.masks.items():
        if name in tensors:
            value = tensors[name]
            if mask.device != value.device:
                mask = delta.masks[name] = mask.to(value.device)
            yield value, mask


@torch.no_grad()
def apply_masks(delta: "Delta") -> None:
    """Set what does not live to 0, in place."""
    for value, mask in _masked(delta):
        value.masked_fill_(~mask, 0)


def mask_gradients(delta: "Delta") -> None:
    """Set the gradients of what does not live to 0, so that neither clipping nor momentum sees them."""
    for value, mask in _masked(delta):
        if value.grad is not None:
            value.grad.masked_fill_(~mask, 0)


def hold(delta: "Delta", optimizer: torch.optim.Optimizer) -> None:
    """Keep the zeros through every step of an optimizer, whatever momentum and decay it holds.

    For a loop of your own; `fit` and `DeltaTrainer` do it by themselves. Masks that are set later count as well.
    """
    reference = weakref.ref(delta)

    def before(*_: Any) -> None:
        if (found := reference()) is not None:
            mask_gradients(found)

    def after(*_: Any) -> None:
        if (found := reference()) is not None:
            apply_masks(found)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


# files

def packed(delta: "Delta", tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(tensors with every mask's bits and only living values, shape of each mask), as a file holds them."""
    if lost := [name for name in delta.masks if name not in tensors and name not in _pruned(delta)]:
        raise DeltaError(f"delta '{delta.name}': {lost[0]} has a mask, and is not saved as such.",
                         "Its method saves something else in its stead: call set_masks({}) first.")
    stored = {name: living(t, delta.masks[name].to(t.device)) if name in delta.masks else t
              for name, t in tensors.items()}
    bits = {PREFIX + name: pack(mask) for name, mask in delta.masks.items()}
    return stored | bits, {name: list(mask.shape) for name, mask in delta.masks.items()}


def unpacked(tensors: Mapping[str, Tensor], told: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors, masks) of what `packed` gave. Errors: DeltaError for bits that fit no shape or no tensor."""
    if told is None:
        return dict(tensors), {}
    if not isinstance(told, dict) or not all(_is_shape(shape) for shape in told.values()):
        raise DeltaError("delta.json does not say the shapes of its masks.", "Nothing was loaded.")
    plain, masks = split_masks(tensors, told)
    return {n: spread(t, masks[n]) if n in masks else t for n, t in plain.items()}, masks


def split_masks(tensors: Mapping[str, Tensor],
                shapes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the other tensors, the masks), of tensors that hold masks' bits."""
    plain, masks = dict(tensors), {}
    for name, shape in shapes.items():
        bits = plain.pop(PREFIX + name, None)
        if bits is None:
            raise DeltaError(f"the mask of {name} is missing.", "Nothing was loaded.")
        masks[name] = unpack(bits, tuple(shape))
    return plain, masks


def kept(delta: "Delta", name: str, numel: int) -> int:
    """How many numbers of a tensor live."""
    mask = delta.masks.get(name)
    return numel if mask is None else int(mask.sum())


def _pruned(delta: "Delta") -> set[str]:
    return {own.key for own in delta.owned if own.group == "pruned"}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape)
