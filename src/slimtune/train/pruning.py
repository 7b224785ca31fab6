"""Pruning in a run: masks drawn once before the first step, or anew every few steps while it trains.

    W' = m * W,    W <- W - step(m * dL/dW'),    m = masks drawn from W

The optimizer moves a dense W, its shadow, that stands in the parameter for the length of its step and at no other time.
A pruned weight keeps its value there, changed by momentum and decay alone, and can come back when masks are drawn anew;
with SR-STE it is trained too (see schedule.py).
When they are for the last time, the shadow is dropped. Weights of the backbone that are not trained are their own.
"""
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.core.bits import living, pack, spread, unpack
from slimtune.core.delta import Delta
from slimtune.core.mask import apply_masks, mask_gradients
from slimtune.data.examples import Collate
from slimtune.errors import DeltaError, MethodError, RecipeError
from slimtune.sparsity.granularity import as_granularity
from slimtune.sparsity.magnitude import Magnitude
from slimtune.sparsity.movement import Movement
from slimtune.sparsity.observe import Observing
from slimtune.sparsity.prune import check, prune, prune_in_rounds
from slimtune.sparsity.schedule import SRSTE, Cubic, OneShot, Ramp
from slimtune.sparsity.target import SLICED, targets
from slimtune.sparsity.threshold import Threshold
from slimtune.sparsity.view import Batch, View
from slimtune.train.predict import on_device
from slimtune.train.prunespec import PruneSpec
from slimtune.train.spec import TrainSpec
from slimtune.train.state import BESIDE, kept_rng

log = logging.getLogger("slimtune")
Draw = Callable[[int], Sequence[Batch]]
"""Batches of training examples for a criterion, other ones at each step."""


def drawn(delta: Delta, data: Any, collate: Collate, pruning: PruneSpec, spec: TrainSpec) -> Draw:
    """Examples by seed and step alone, so that a resumed run scores by the same."""
    def draw(step: int) -> Sequence[Batch]:
        if not pruning.rule_of.needs_data:
            return ()
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
        order = torch.randperm(len(data), generator=generator)[:pruning.examples].tolist()
        return [on_device(collate([data[i] for i in order[k:k + spec.batch_size]]), delta.model)
                for k in range(0, len(order), spec.batch_size)]
    return draw


def check_pruning(delta: Delta, pruning: PruneSpec | None, spec: TrainSpec, private: bool) -> None:
    """Errors: RecipeError, MethodError for what a run cannot prune, before it begins."""
    if spec.schedule == "rewinding" and not (pruning and isinstance(pruning.schedule, Cubic)):
        raise RecipeError("train.schedule=rewinding: goes with masks that change while training.",
                          "Set prune.schedule=cubic.")
    if pruning is None:
        return
    rule = pruning.rule_of
    check(delta, pruning.sparsity, rule, as_granularity(pruning.granularity), pruning.on, pruning.by,
          pruning.allocation)
    chosen = targets(delta, pruning.on, pruning.sites, pruning.blocks, pruning.pooler)
    if private and (rule.needs_data or rule.observes or not isinstance(pruning.schedule, OneShot)):
        raise RecipeError("prune: a private run prunes once, by a criterion that reads no training data.",
                          "Choose magnitude or random, and schedule one_shot.")
    if pruning.on in SLICED and pruning.by == "own" and type(rule) is Magnitude and pruning.schedule == OneShot():
        log.warning("prune: gates all start at 1, so by their magnitude the first of them go. Set prune.by=weights, "
                    "prune.schedule=cubic, or a criterion that reads data, such as taylor or fisher.")
    if spec.cache is not False and pruning.on in ("base", "both"):
        raise RecipeError("train.cache: holds what the unpruned base computes.", "Leave train.cache out.")
    straight = isinstance(pruning.schedule, SRSTE)
    if (rule.observes or straight) and (still := [n for n, t in chosen.items() if not t.parameter.requires_grad]):
        raise MethodError(f"{'SRSTE' if straight else type(rule).__name__} watches weights train, and delta "
                          f"'{delta.name}' does not train {still[0]}.", "Attach Full(), or prune on='delta'.")


def open_pruner(delta: Delta, data: Any, collate: Collate, pruning: PruneSpec | None, spec: TrainSpec,
                fresh: bool) -> "Pruner | None":
    """Prune a fresh run in one shot, or give what prunes while it trains."""
    if pruning is None:
        return None
    draw = drawn(delta, data, collate, pruning, spec)
    if not isinstance(pruning.schedule, OneShot):
        return Pruner(delta, pruning, spec.seed, draw)
    if fresh:
        options = {**pruning.arguments(), "batches": draw(0), "seed": spec.seed}
        with kept_rng():
            if pruning.schedule.rounds > 1:
                prune_in_rounds(delta, pruning.sparsity, pruning.schedule.rounds, **options)  # type: ignore[arg-type]
            else:
                prune(delta, pruning.sparsity, **options)
    return None


class Pruner:
    """The masks of a run that change while it trains: what they are, when they change, and what stands behind them.

    `enter` and `leave` go around each step of the optimizer, `watch` behind each backward pass.
    """

    def __init__(self, delta: Delta, spec: PruneSpec, seed: int, draw: Draw) -> None:
        self.delta, self.spec, self.seed, self.draw, self.rule = delta, spec, seed, draw, spec.rule_of
        self.before, self.prior = dict(delta.masks), list(delta.info.get("sparsity", []))
        self.view = View(delta, targets(delta, spec.on, spec.sites, spec.blocks, spec.pooler), seed=seed)
        self.ramp: Ramp | None = None
        self.shadow: dict[str, Tensor] = {}

    def schedule(self, steps: int) -> Ramp:
        """The schedule of a run of so many steps; called before anything else."""
        assert not isinstance(self.spec.schedule, OneShot)
        assert self.spec.final is not None
        self.ramp = self.spec.schedule.ramp(steps, self.spec.final)
        return self.ramp

    def begin(self) -> None:
        """At step 0 of a run."""
        if self._shadowed(0):
            self.shadow = {name: p.detach().clone() for name, p in self._trained().items()}
        self._update(0)

    def watch(self, step: int) -> None:
        """Show the gradients, after so many steps, to a criterion that observes; take out those of what is dead, but
        for a schedule that trains it."""
        straight: dict[str, Tensor] = {}
        if isinstance(self.rule, Observing) and self.shadow:
            self.rule.observe(self.view, self._gradients(), self.shadow, **self._strength(step))
        if isinstance(self.spec.schedule, SRSTE) and self.shadow:
            rule = self.spec.schedule.gradient
            straight = {n: rule(g, self._mask(n), self.shadow[n]) for n, g in self._gradients().items()}
        mask_gradients(self.delta)
        for name, g in straight.items():
            self._trained()[name].grad = g.masked_fill(~self.before[name], 0) if name in self.before else g

    @torch.no_grad()
    def enter(self) -> None:
        """The dense weights, for the optimizer."""
        for name, p in self._trained().items():
            if name in self.shadow:
                p.copy_(self.shadow[name])

    @torch.no_grad()
    def leave(self, step: int) -> None:
        """What the optimizer made of them is kept, and masked."""
        for name, p in self._trained().items():
            if name in self.shadow:
                self.shadow[name].copy_(p)
        self._update(step)
        if not self._shadowed(step):
            self.shadow = {}

    def _update(self, step: int) -> None:
        assert self.ramp is not None
        share = self.ramp.at(step)
        if self.ramp.due(step) and share > 0:
            if self.spec.schedule.reenter:  # type: ignore[union-attr]
                self.delta.set_masks(self.before)
            else:
                apply_masks(self.delta)
            with kept_rng():
                prune(self.delta, **self.spec.at(share), batches=self.draw(step), seed=self.seed,
                      notes=self.view.notes)
            self.delta.info["sparsity"] = [*self.prior, self.delta.info["sparsity"][-1]]
        else:
            apply_masks(self.delta)

    def _gradients(self) -> dict[str, Tensor]:
        """Raw, dL/dW'."""
        found = {name: p.grad for name, p in self._trained().items()}
        if lost := [name for name, g in found.items() if g is None]:
            raise MethodError(f"prune got no gradient of {lost[0]}.",
                              "The loss does not depend on it: leave it out of prune.sites.")
        return found  # type: ignore[return-value]

    def _strength(self, step: int) -> dict[str, float]:
        """Of soft movement, lambda(t) = lambda tau(t) / tau."""
        rule, bar = self.rule, self.spec.allocation
        if not (isinstance(bar, Threshold) and isinstance(rule, Movement)):
            return {}
        assert self.ramp is not None
        return {"strength": rule.strength * self.ramp.at(step) / bar.tau}

    def _trained(self) -> dict[str, Tensor]:
        own = self.delta.tensors()
        return {name: own[name] for name in self.view.targets if name in own and own[name].requires_grad}

    def _shadowed(self, step: int) -> bool:
        """Whether masks change after this step, and may set free what they hold now."""
        assert self.ramp is not None
        return (self.spec.schedule.reenter or self.rule.observes) and step < self.ramp.until  # type: ignore[union-attr]

    @property
    def sparsity(self) -> float | None:
        """Of the masks as they are; None before the first."""
        now = self.delta.info.get("sparsity", [])
        return now[-1]["sparsity"] if len(now) > len(self.prior) else None

    # checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the delta: of the shadow, what is not in the delta's tensors."""
        held = {f"{BESIDE}shadow.{name}": living(t, ~self._mask(name)) for name, t in self.shadow.items()}
        first = {f"{BESIDE}before.{name}": pack(mask) for name, mask in self.before.items()}
        seen = self.rule.seen(self.view) if isinstance(self.rule, Observing) else {}
        return held | first | {f"{BESIDE}seen.{name}": t for name, t in seen.items()}

    def facts(self) -> dict[str, Any]:
        """What else it holds."""
        return {"before": {name: list(mask.shape) for name, mask in self.before.items()}, "prior": self.prior}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `facts` gave; the delta is at that step already."""
        kept: dict[str, dict[str, Tensor]] = {"shadow": {}, "before": {}, "seen": {}}
        for name, value in tensors.items():
            if name.startswith(BESIDE):
                kind, _, rest = name.removeprefix(BESIDE).partition(".")
                kept[kind][rest] = value
        self.prior = facts["prior"]
        if kept["before"].keys() != facts["before"].keys():
            raise DeltaError("the checkpoint's masks of before the run are not whole.", "Resume from another.")
        self.before = {name: unpack(kept["before"][name], tuple(shape)) for name, shape in facts["before"].items()}
        trained = self._trained()
        self.shadow = {name: torch.where(mask, trained[name].detach(), spread(value.to(mask.device), ~mask))
                       for name, value in kept["shadow"].items() if (mask := self._mask(name)) is not None}
        if isinstance(self.rule, Observing):
            device = next(iter(self.view.weights.values())).device
            self.rule.resume(self.view, {name: value.to(device) for name, value in kept["seen"].items()})

    def _mask(self, name: str) -> Tensor:
        mask = self.delta.masks.get(name)
        return torch.ones_like(self._trained()[name], dtype=torch.bool) if mask is None else mask
