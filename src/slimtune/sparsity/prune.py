"""prune: score, allocate, mask; once. Schedules call it again with more (see schedule.py)."""
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from slimtune.core import Delta
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.allocation import Rule, Ties, find_allocation
from slimtune.sparsity.budget import Budget, within
from slimtune.sparsity.criterion import Criterion, as_criterion, criterion_config
from slimtune.sparsity.granularity import NM, Element, Granularity, as_granularity
from slimtune.sparsity.movement import Movement
from slimtune.sparsity.schedule import geometric
from slimtune.sparsity.structure import gate_scores
from slimtune.sparsity.target import SLICED, On, check_norms, denominator, oriented, targets
from slimtune.sparsity.threshold import Threshold
from slimtune.sparsity.view import Batch, View, task_loss

log = logging.getLogger("slimtune")


@dataclass(frozen=True)
class Sparsity:
    """What was pruned: counts of weights, the share that is 0, and of what it is a share."""

    kept: int
    total: int
    denominator: str
    tensors: dict[str, tuple[int, int]]
    """Kept and total of each."""

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.total

    def as_dict(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "kept": self.kept, "total": self.total, "denominator": self.denominator}

    def __str__(self) -> str:
        return (f"{100 * self.sparsity:.2f} % of {self.denominator} pruned: {self.kept:,} of {self.total:,} weights "
                f"live in {len(self.tensors)} tensors. Zeros alone make nothing faster; see shrink.")


def prune(delta: Delta, sparsity: float | None = None, criterion: Criterion | str | dict[str, Any] = "magnitude", *,
          on: On = "delta", allocation: str | Budget | Threshold | None = None,
          granularity: Granularity | str | dict[str, Any] = "element", by: str = "own",
          batches: Sequence[Batch] = (), sites: Sequence[str] = ("linear",), blocks: Sequence[int] | None = None,
          pooler: bool = False, ties: Ties = "exact", rule: Rule = "floor", seed: int = 0,
          loss: Callable[..., Tensor] = task_loss, notes: dict[str, Any] | None = None) -> Sparsity:
    """Prune a delta, the backbone below it, or both, to a sparsity; masks that hold already count, and stay.

    sparsity: the share that is 0 afterwards; of n:m and of a Threshold it follows, and is not given.
    on, sites, blocks, pooler: what may be pruned (see target.py). by: with on="gates" or "hidden", "own" scores the
    gates themselves, and "weights" sums the scores of the weights that go with each head, neuron or dimension.
    allocation: by default as the criterion's paper compares scores, mostly "global".
    batches: inputs with labels, for a criterion that needs them. ties, rule: see allocation.py.
    notes: what an observing criterion has seen.

    Errors: MethodError for a combination that cannot be, with the reason; nothing is changed then.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.testing import tiny
        >>> print(prune(attach(tiny("bert"), LoRA(rank=4)), 0.5, "random"))
        50.00 % of delta pruned: 512 of 1,024 weights live in 8 tensors. Zeros alone make nothing faster; see shrink.
    """
    rule_of, units = as_criterion(criterion), as_granularity(granularity)
    _known(on=(on, On), ties=(ties, Ties), rule=(rule, Rule))
    chosen = targets(delta, on, sites, blocks, pooler)
    check(delta, sparsity, rule_of, units, on, by, allocation)
    if allocation is None:
        allocation = "global" if on in SLICED else rule_of.allocation
    held = {name: delta.masks[name] for name in chosen if name in delta.masks}
    view = View(delta, chosen, batches, seed, loss, held, {} if notes is None else notes)
    scores = rule_of.score(view) if by == "own" else _of_gates(view, rule_of)
    masks = _masks(view, scores, sparsity, allocation, units, ties, rule)
    if rule_of.changes and by == "own":
        rule_of.repair(view, masks)
    delta.set_masks({**delta.masks, **masks})
    found = measured(masks, denominator(on, pooler))
    if dead := [n for n, (kept, _) in found.tensors.items() if not kept and n in delta.tensors() and on not in SLICED]:
        log.warning("nothing lives any more of %d of %d tensors, such as %s", len(dead), len(masks), dead[0])
    delta.info["sparsity"] = [*delta.info.get("sparsity", []), {
        **found.as_dict(), "criterion": criterion_config(rule_of), "on": on, "by": by,
        "allocation": allocation if isinstance(allocation, str) else allocation.model_dump(mode="json"),
        "granularity": {"name": type(units).__name__.lower(), **units.model_dump(mode="json")}}]
    return found


def _known(**options: tuple[str, Any]) -> None:
    """Errors: MethodError for a name that none of an option's is."""
    for option, (given, names) in options.items():
        if given not in get_args(names):
            raise MethodError(f"prune has no {option}='{given}'.", f"There are: {listing(get_args(names))}",
                              suggest(given, get_args(names)))


def prune_in_rounds(delta: Delta, sparsity: float, rounds: int, criterion: Criterion | str | dict[str, Any] = "snip",
                    **options: Any) -> Sparsity:
    """prune() again and again, scored anew each time: a share (1 - sparsity)^(r / rounds) lives after round r.

    options: those of prune(). Errors: as prune's; the masks of the rounds before stand then.
    """
    before = delta.info.get("sparsity", [])
    *shares, last = geometric(sparsity, rounds)
    for share in shares:
        prune(delta, share, criterion, **options)
    found = prune(delta, last, criterion, **options)
    delta.info["sparsity"] = [*before, {**delta.info["sparsity"][-1], "rounds": rounds}]
    return found


def _of_gates(view: View, rule: Criterion) -> dict[str, Tensor]:
    """Scores of gates from those of the weights that go with them, of which the dead count for nothing."""
    base = targets(view.delta, "base")
    held = {n: m for n, m in view.delta.masks.items() if n in base}
    scores = rule.score(View(view.delta, base, view.batches, view.seed, view.loss, held, view.notes))
    return gate_scores(view.delta, view.targets,
                       {n: s.masked_fill(~held[n], 0) if n in held else s for n, s in scores.items()})


def measured(masks: dict[str, Tensor], what: str) -> Sparsity:
    """The counts of some masks."""
    tensors = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    return Sparsity(sum(k for k, _ in tensors.values()), sum(n for _, n in tensors.values()), what, tensors)


@torch.no_grad()
def _masks(view: View, scores: dict[str, Tensor], sparsity: float | None, allocation: str | Budget | Threshold,
           units: Granularity, ties: Ties, rule: Rule) -> dict[str, Tensor]:
    """Masks in the tensors' own shapes; what was dead stays dead."""
    if strange := [name for name, s in scores.items() if not bool(torch.isfinite(s).all())]:
        raise MethodError(f"the scores of {strange[0]} are not finite.", "Is the model's loss? Nothing was pruned.")
    pooled = _pooled(view, scores, units)
    if isinstance(units, NM):
        keep = {name: units.keep(s) for name, s in pooled.items()}
    elif isinstance(allocation, Threshold):
        keep = allocation.keep(pooled)
    elif isinstance(allocation, Budget):
        keep = within(pooled, allocation.costs(view.delta, view.targets), float(sparsity or 0),
                      allocation.multiples(view.targets))
    else:
        keep = find_allocation(allocation)(pooled, float(sparsity or 0), ties, rule)
    full = {name: oriented(m, view.targets[name]) for name, m in units.expand(keep, view.targets).items()}
    return {name: m & view.masks[name] if name in view.masks else m for name, m in full.items()}


def _pooled(view: View, scores: dict[str, Tensor], units: Granularity) -> dict[str, Tensor]:
    """The score of each unit, the lowest there is where all its weights are dead."""
    single = isinstance(units, Element | NM)
    lives = {name: view.masks.get(name, torch.ones_like(s, dtype=torch.bool)) for name, s in scores.items()}
    seen = {name: oriented(s.masked_fill(~lives[name], -torch.inf if single else 0), view.targets[name])
            for name, s in scores.items()}
    pooled = units.pool(seen, view.targets)
    if single or not view.masks:
        return pooled
    alive = units.pool({name: oriented(m.to(seen[name].dtype), view.targets[name]) for name, m in lives.items()},
                       view.targets)
    return {name: s.masked_fill(alive[name] == 0, -torch.inf) for name, s in pooled.items()}


def check(delta: Delta, sparsity: float | None, rule: Criterion, units: Granularity, on: On, by: str,
          allocation: str | Budget | Threshold | None) -> None:
    """Errors: MethodError for what cannot be pruned so, with the reason."""
    name = type(rule).__name__
    if isinstance(units, NM):
        if sparsity is not None or allocation is not None:
            raise MethodError(f"{units.n}:{units.m} decides its own sparsity, 1 - n / m, in each group of weights.",
                              "Leave sparsity and allocation out.")
    elif isinstance(allocation, Threshold):
        _check_threshold(rule, sparsity)
    elif sparsity is None or not 0 <= sparsity < 1:
        raise MethodError(f"sparsity={sparsity}: it is the share that is pruned, from 0 to below 1.",
                          "Give for example 0.5.")
    if by not in ("own", "weights") or (by == "weights" and on not in SLICED):
        raise MethodError(f"by='{by}' with on='{on}': only gates can be scored by the weights that go with them.",
                          "Say on='gates' or on='hidden' with by='weights', or leave by out.")
    if isinstance(allocation, str):
        find_allocation(allocation)
    if isinstance(allocation, Budget):
        _check_budget(delta, on, units, allocation)
    if on == "hidden":
        check_norms([delta])
    if rule.changes and not isinstance(units, Element | NM):
        raise MethodError(f"{name} moves single weights for single weights that go.",
                          "Choose granularity='element' or n:m.")
    if on in SLICED and by == "own" and rule.changes:
        raise MethodError(f"{name} moves weights, and gates are none.", "Choose another criterion, or by='weights'.")
    if by == "weights" and rule.observes:
        raise MethodError(f"{name} learns its scores of what is pruned while that trains, which here are the gates: "
                          "by='weights' would ask it for scores of the weights behind them.",
                          "Leave by out, or choose a criterion that can score weights at any time, such as taylor.")
    if rule.needs_data and (delta.merged or not delta.active):
        raise MethodError(f"{name} runs the model with delta '{delta.name}', which is "
                          f"{'merged' if delta.merged else 'not active'}.",
                          f"Call {'unmerge' if delta.merged else 'activate'}() first.")


def _check_budget(delta: Delta, on: On, units: Granularity, budget: Budget) -> None:
    if on != "gates" or not isinstance(units, Element):
        raise MethodError("a budget counts what heads and neurons cost, and they are gates; hidden dimensions "
                          "cost the same each.", "Say on='gates', with granularity='element', or leave the budget out.")
    gates = targets(delta, on)
    budget.costs(delta, gates)
    budget.multiples(gates)


def _check_threshold(rule: Criterion, sparsity: float | None) -> None:
    if not isinstance(rule, Movement):
        raise MethodError(f"a threshold is on sigma(S), and the scores of {type(rule).__name__} are no such S.",
                          "Choose criterion='movement', or another allocation.")
    if sparsity is not None:
        raise MethodError("a threshold decides its own sparsity: what scores above it lives.",
                          "Leave sparsity out; tau and the criterion's strength say how much goes.")
