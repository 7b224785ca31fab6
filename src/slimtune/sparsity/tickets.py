"""Lottery tickets: train, prune a share of what lives, go back to where it began, and again.

    theta_i <- a snapshot;   k times:  theta_T <- train(m * theta_i),   m <- m without the lowest share p of what lives,
    theta <- m * theta_i     so that a share (1 - p)^k lives

    rewind="weights"     to theta_i, as above
    rewind="rate"        the weights stay, and train() begins its learning rate anew
    rewind="finetune"    the weights stay, and finetune() trains them at a small learning rate

With `group`, such as `refill_delta` or `regroup_delta`, each round's mask is made one of structure before the next
begins ("group-aware"): m <- group(m), and what it fills in begins at theta_i. The paper finds it worse than to do so
once, with the last mask.

The control draws other first values under the same masks: a ticket that is no better than that has won nothing.

Source: Frankle, Carbin, 2019, "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 1; of theta_i, Frankle et al.,
2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671, algorithm 2; of the learning rate,
Renda, Frankle, Carbin, 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv 2003.02389; of
groups, Chen et al., 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", arXiv 2202.04736,
section 3.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimtune.core import Delta, attach, deltas
from slimtune.errors import MethodError
from slimtune.sparsity.prune import Sparsity, measured, prune
from slimtune.sparsity.schedule import iterative

State = dict[str, Tensor]
Train = Callable[[Delta], Any]
Group = Callable[[Delta], State]
"""All masks of a delta from those that it holds."""


@dataclass(frozen=True)
class Ticket:
    """Masks, theta_i to begin with, theta_T that the last training ended with, and the sparsity of each round."""

    masks: State
    start: State
    trained: State
    rounds: tuple[Sparsity, ...] = ()


def snapshot(delta: Delta) -> State:
    """All values, copied: theta_i, to be taken before training or early in it."""
    return {name: value.clone() for name, value in delta.state().items()}


def find_ticket(delta: Delta, train: Train, rounds: int, *, rate: float = 0.2, start: State | None = None,
                rewind: Literal["weights", "rate", "finetune"] = "weights", finetune: Train | None = None,
                group: Group | None = None, criterion: Any = "magnitude", **options: Any) -> Ticket:
    """Iterative pruning: `rounds` times train and prune `rate` of what lives; the delta is left as the ticket.

    train: trains the delta in place, from the values it has, at a learning rate that begins anew. start: theta_i,
    the delta's values as they are by default. group: of the delta, still trained and pruned, the masks to go on with,
    such as refill_delta; a round then removes `rate` of what lives in those. options: those of prune(), such as
    on="base".

    Errors: MethodError for a rate that removes nothing or all, for a finetune that is missing, and for a group that
    has no weights to go back to or leaves nothing.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import Pfeiffer
        >>> from slimtune.testing import tiny
        >>> delta = attach(tiny("bert"), Pfeiffer(bottleneck=8))
        >>> ticket = find_ticket(delta, lambda delta: None, rounds=3)
        >>> [round(1 - found.sparsity, 3) for found in ticket.rounds]
        [0.801, 0.641, 0.513]
    """
    if not 0 < rate < 1 or rounds < 1:
        raise MethodError(f"find_ticket: {rounds} rounds at rate {rate}.", "Choose rounds >= 1 and 0 < rate < 1.")
    if (rewind == "finetune") != (finetune is not None):
        raise MethodError("find_ticket: rewind='finetune' and finetune=... go together.", "Give both, or neither.")
    if group is not None and rewind != "weights":
        raise MethodError(f"find_ticket: a group fills weights in that rewind='{rewind}' has no values of.",
                          "Choose rewind='weights', or group once, with the last masks.")
    start = snapshot(delta) if start is None else start
    found, trained = [], start
    delta.load_state(start)
    for number, sparsity in enumerate(iterative(rate, rounds)):
        (train if finetune is None or number == 0 else finetune)(delta)
        trained = snapshot(delta)
        if group is not None and found:
            sparsity = 1 - (1 - rate) * (1 - found[-1].sparsity)
        done = prune(delta, sparsity, criterion, **options)
        found.append(done if group is None else _grouped(delta, group, done))
        if rewind == "weights":
            delta.load_state(start)
    return Ticket(dict(delta.masks), start, trained, tuple(found))


def _grouped(delta: Delta, group: Group, done: Sparsity) -> Sparsity:
    """Set a group's masks, and say what lives in those of a pruning."""
    delta.set_masks(group(delta))
    now = measured({name: delta.masks[name] for name in done.tensors}, done.denominator)
    if not now.kept:
        raise MethodError(f"find_ticket: nothing lives in the groups of {done.kept} weights.",
                          "Ask for fewer rounds, a lower rate or smaller groups.")
    delta.info["sparsity"] = [*delta.info["sparsity"][:-1],
                              {**delta.info["sparsity"][-1], **now.as_dict(), "grouped": True}]
    return now


def draw_ticket(delta: Delta, ticket: Ticket, values: State) -> None:
    """Set the delta to a ticket's masks, over other values. Errors: as set_masks and load_state."""
    delta.set_masks(ticket.masks)
    delta.load_state(values)


def first_values(delta: Delta, seed: int) -> State:
    """Other first values for all of the delta: those of its backbone's architecture before any training, and of its
    methods on it; nothing is set. It takes a second copy of the model for a moment.

    Errors: MethodError for a model that does not say how it is initialised.
    """
    model = copy.deepcopy(delta.model)
    for other in list(deltas(model).values()):
        other.detach()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices[:1]):
        torch.manual_seed(seed)
        initialise(model)
    return snapshot(attach(model, list(delta.methods), delta.name, seed=seed))


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Draw every parameter anew, as the architecture does: transformers' `_init_weights`, or `reset_parameters`."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():  # tensors that were loaded are marked, and would be passed over
        for name, p in module._parameters.items():
            if p is not None:
                empty = nn.Parameter(torch.full_like(p, torch.nan), requires_grad=p.requires_grad)
                module._parameters[name] = fresh.setdefault(id(p), empty)

    def walk(module: nn.Module, owner: Any) -> None:
        owner = module if hasattr(module, "_init_weights") else owner
        for child in module.children():
            walk(child, owner)
        if owner is not None:
            owner._init_weights(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    walk(model, None)
    if lost := [name for name, p in model.named_parameters() if bool(p.isnan().any())]:
        raise MethodError(f"{type(model).__name__} does not say how {lost[0]} is initialised.",
                          "Give the values yourself.")
