"""Gradient checkpointing with `use_reentrant=True` recomputes only blocks whose input asks for a gradient.

With a frozen backbone the first block's input asks for none, and its deltas would silently not train.
"""
from typing import TYPE_CHECKING, Any

from torch import Tensor, is_grad_enabled, nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.insert import CHILD, Insert, Plan, Slot, hook_with, insert_at

if TYPE_CHECKING:
    from slimtune.core.delta import Delta


class _Opens:
    """The method of the slots below: it has nothing to configure."""


def open_checkpoints(model: nn.Module, anatomy: Anatomy, plan: Plan, delta: "Delta") -> None:
    """Let the first block's input of each tower ask for a gradient, while checkpointing is on.

    A side network needs no gradient through the backbone, and gets none.
    """
    if not any(slot.kind in ("output", "input", "kv", "added") for _, slot in delta.slots) and not any(
            own.group != "head" for own in delta.owned):
        return
    for tower in anatomy.towers:
        path = tower.blocks[0]
        site = next((s for s in anatomy.sites if s.path == path and s.role == "block"), None)
        if site is None:  # convolutions alone, which transformers does not checkpoint
            continue
        slot = Slot(_Opens(), site, "checkpoint", f"{site.name}.checkpoint")
        block = model.get_submodule(_outermost(model, path))
        insert_at(block, plan).add(delta.name, slot)
        delta.hosts.append(block)
        hook_with(block, _open, pre=True)


def _outermost(model: nn.Module, path: str) -> str:
    """The widest module around a block that transformers checkpoints as one: Swin's blocks are in stages."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if any(c.__name__ == "GradientCheckpointingLayer" for c in type(model.get_submodule(outer)).__mro__):
            return outer
    return path


def _open(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    if not (getattr(block, "gradient_checkpointing", False) and block.training and is_grad_enabled()
            and args and isinstance(args[0], Tensor) and insert.live("checkpoint")):
        return None
    h = args[0]
    return None if h.requires_grad else ((h.detach().requires_grad_(), *args[1:]), kwargs)


HOOKS = (_open,)
