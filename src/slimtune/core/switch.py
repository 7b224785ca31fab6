"""Which deltas run on a model: one tuple in the plan; and how their hooks come off."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from slimtune.core import blocktokens, insert, pixels, positions, promptkeys, quiet, reentrant, side, tokens, windows
from slimtune.core.insert import CHILD, LOCK, Insert, Root
from slimtune.core.keyvalues import unwrap
from slimtune.core.labels import refuse_labels
from slimtune.core.unfreeze import base_parameters
from slimtune.errors import DeltaError, MethodError, listing, suggest

if TYPE_CHECKING:
    from slimtune.core.delta import Delta

PARTS = (insert, tokens, blocktokens, promptkeys, windows, pixels, quiet, positions, side, reentrant)
HOOKS = tuple(hook for part in PARTS for hook in part.HOOKS)


def strip(root: Root, name: str, hosts: Sequence[nn.Module]) -> None:
    """Take a delta's slots off these hosts, and our children and hooks where nothing is left."""
    held = {id(h): h for h in hosts if isinstance(h._modules.get(CHILD), Insert)}.values()
    for host in held:
        host._modules[CHILD].drop(name)  # type: ignore[union-attr]
    for host in held:
        insert.prune(host, HOOKS)
    root.shared._modules.pop(name, None)


def leave(root: Root, model: nn.Module, name: str, hosts: Sequence[nn.Module], attention: bool) -> None:
    """Take off what a detached delta left; when no thread has a route open, for those still need its hooks."""
    if root.plan.routes:
        old = f"{name}~{len(root.leaving)}"  # the name is free for another delta
        for insert in {id(i): i for h in hosts if isinstance(i := h._modules.get(CHILD), Insert)}.values():
            insert.rename(name, old)
        if name in root.shared._modules:
            root.shared._modules[old] = root.shared._modules.pop(name)
        root.leaving.append(partial(leave, root, model, old, hosts, attention))
        return
    strip(root, name, hosts)
    if not root.deltas:
        thaw(model, root)
    if attention:
        release(root, hosts)


def thaw(model: nn.Module, root: Root) -> None:
    """The model as it was before the first delta: no child, no hook, and what was trainable is so again."""
    for path, p in base_parameters(model).items():
        p.requires_grad_(root.required.get(path, True))
    insert.unhook(model, (refuse_labels,))
    model._modules.pop(CHILD, None)


def release(root: Root, hosts: Iterable[nn.Module]) -> None:
    """Give the hosts' configs their own attention back, unless a delta still has keys and values there."""
    if not any(s.kind == "kv" for d in root.deltas.values() for _, s in d.slots):
        for host in hosts:
            unwrap(getattr(host, "config", None))


def set_active(root: Root, names: tuple[str, ...], weights: Mapping[str, float] | None = None) -> None:
    """Let exactly these deltas run, in this order. Of tensors that several own, the last one's stands."""
    with LOCK:
        if root.plan.active != names:
            _swap(root, names)
        root.plan.weights = dict(weights or {})


def _swap(root: Root, names: tuple[str, ...]) -> None:
    for delta in root.deltas.values():
        if delta.merged:
            raise DeltaError(f"delta '{delta.name}' is merged into the backbone.", "Call unmerge() on it first.")
    before = [own for name in root.plan.active for own in root.deltas[name].owned]
    after = [own for name in names for own in root.deltas[name].owned]
    for route in root.plan.routes.values():  # answers in flight keep what they read
        for own in (*before, *after):
            for module, key in own.places:
                route.pin(root, module, {key: own.base})
    for own in before:
        own.swap(False)
    root.plan.active = names
    for own in after:
        own.swap(True)


def activate(model: nn.Module, *names: str, weights: Sequence[float] | None = None) -> None:
    """Let these deltas run together; none of them runs the plain backbone.

    They are stacked: each works on what those before it made. With weights they are averaged where they add,
    every one on the backbone's own output:

        y <- y + sum_t w_t (f_t(x, y) - y)

    Of tensors of the backbone and head that several own, the last one's stands; `average` mixes those too.
    Errors: DeltaError for an unknown name; it lists those that are attached; MethodError for weights with a
    delta that does not add to outputs.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> a, b = attach(model, LoRA(), name="a"), attach(model, LoRA(), name="b", seed=1)
        >>> activate(model, "a", "b", weights=(0.5, 0.5))
    """
    found = deltas(model)
    for name in names:
        if name not in found:
            raise DeltaError(f"no delta named '{name}' is attached.", f"There are: {listing(found) or 'none'}",
                             suggest(name, found))
    if found:
        set_active(model._modules[CHILD], tuple(dict.fromkeys(names)),  # type: ignore[arg-type]
                   None if weights is None else _weights(found, names, weights))


def _weights(found: Mapping[str, Delta], names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if len(set(names)) != len(weights) or len(names) != len(weights):
        raise DeltaError(f"activate got {len(names)} deltas ({listing(names)}) and {len(weights)} weights.",
                         "Name each delta once, and give one weight for each.")
    for name in names:
        for _, slot in found[name].slots:
            if slot.kind not in ("output", "input"):
                raise MethodError(f"delta '{name}' cannot be averaged: {type(slot.method).__name__} does not add to a "
                                  "module's output.", "Activate it without weights, or use average().")
    return dict(zip(names, map(float, weights), strict=True))


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The deltas on a model, by name."""
    root = model._modules.get(CHILD)
    return dict(root.deltas) if isinstance(root, Root) else {}
