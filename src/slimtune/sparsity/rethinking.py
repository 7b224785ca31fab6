"""Is it the weights or the architecture? One pruned architecture, trained from five starts.

    arm              values to begin with        epochs
    finetune         theta_T m, as trained       those of fine-tuning
    scratch_E        drawn anew                  E, as the large model had
    scratch_B        drawn anew                  int(E C / c), as much compute; C, c the multiply-adds of both
    lottery          theta_i m, rewound          E
    random_reinit    drawn anew                  E, the control of lottery

Every new draw has a seed of its own. The architecture's hash must be the same in all arms, the start's in no two.

Source: Liu et al., 2019, "Rethinking the Value of Network Pruning", arXiv 1810.05270, sections 3 and 6; on structured
tickets, Frankle, Carbin, 2019, "The Lottery Ticket Hypothesis", arXiv 1803.03635.
"""
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimtune.core import Delta, base_parameters, to_config
from slimtune.core.bits import pack
from slimtune.errors import MethodError, listing
from slimtune.sparsity.tickets import State, Ticket, draw_ticket, first_values

ARMS = ("finetune", "scratch_E", "scratch_B", "lottery", "random_reinit")


@dataclass(frozen=True)
class Outcome:
    """One arm: how long it trained, the hashes of its architecture and of its start, and what `train` returned."""

    epochs: int
    architecture: str
    start: str
    result: Any


def scratch_b(epochs: int, dense: float, pruned: float, cap: int | None = None) -> int:
    """Epochs of the pruned model that cost what `epochs` of the dense one do: int(E C / c).

    dense, pruned: multiply-adds. cap: the paper's own runs on ImageNet stop at 180.

    Example:
        >>> scratch_b(160, 313_201_664, 206_146_048)
        243
    """
    found = math.floor(epochs * dense / pruned + 1e-9)
    return found if cap is None else min(found, cap)


def compare(delta: Delta, ticket: Ticket, train: Callable[[Delta, int], Any], *, epochs: int, finetune_epochs: int,
            dense: float, pruned: float, arms: Sequence[str] = ARMS, seed: int = 0) -> dict[str, Outcome]:
    """Train the ticket's architecture from each start: train(delta, epochs) does it, in place; the delta is left at
    the last arm's end.

    A delta of a model that was shrunk has an architecture without masks; its ticket then has none.

    Errors: MethodError for an unknown arm; and when two arms begin alike, or are not one architecture.
    """
    if strange := [arm for arm in arms if arm not in ARMS]:
        raise MethodError(f"no arm is named '{strange[0]}'.", f"There are: {listing(ARMS)}")
    plan = {"finetune": finetune_epochs, "scratch_B": scratch_b(epochs, dense, pruned)}
    found: dict[str, Outcome] = {}
    for arm in arms:
        draw_ticket(delta, ticket, _start(delta, ticket, arm, seed))
        hashes = architecture(delta), start_hash(delta)
        for other, outcome in found.items():
            if outcome.architecture != hashes[0] or outcome.start == hashes[1]:
                raise MethodError(f"arms {other} and {arm} " + ("begin alike." if outcome.start == hashes[1] else
                                  "are not one architecture."), "Was the ticket trained, and are its values its own?")
        length = plan.get(arm, epochs)
        found[arm] = Outcome(length, *hashes, train(delta, length))
    return found


def _start(delta: Delta, ticket: Ticket, arm: str, seed: int) -> State:
    if arm in ("finetune", "lottery"):
        return ticket.trained if arm == "finetune" else ticket.start
    return first_values(delta, seed * len(ARMS) + ARMS.index(arm) + 1)


def architecture(delta: Delta) -> str:
    """SHA-256 of what a delta's model is, whatever its values: methods, names, shapes, masks."""
    facts = {"methods": [to_config(m) for m in delta.methods], "masks": sorted(delta.masks),
             "delta": sorted((n, list(p.shape)) for n, p in delta.tensors().items()),
             "base": sorted((n, list(p.shape)) for n, p in base_parameters(delta.model).items())}
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for _, mask in sorted(delta.masks.items()):
        digest.update(pack(mask).numpy().tobytes())
    return digest.hexdigest()


def start_hash(delta: Delta) -> str:
    """SHA-256 of the bits of a delta's values."""
    digest = hashlib.sha256()
    for name, value in sorted(delta.state().items()):
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
