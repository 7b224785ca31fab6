"""Robust lottery tickets: masks that are learned against an adversary, then rewound to the pretrained weights.

    min over log_alpha   E max_d CE(f(x + d; z * W), y) + lambda R,   z ~ hard concrete,   R = mean P(z != 0)

W is fine-tuned on the task and frozen. lambda is 0 for the first tenth of the steps, then rises linearly. A ticket
of any sparsity is drawn once, from the global ranking of log_alpha; it is trained from the pretrained weights again,
with the plain loss:

    delta = attach(model, Full());  fit;  gates = search(model, paths, batches, backward, TicketSpec(...))
    delta.detach();  delta = attach(model, Full());  delta.set_masks(state_names(ticket(gates, 0.3)));  fit

Source: R. Zheng et al., 2022, "Robust Lottery Tickets for Pre-trained Language Models", arXiv 2211.03013,
equations 3 to 8.
"""
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimtune.core.modes import kept_modes
from slimtune.errors import RecipeError, TrainError
from slimtune.sparsity.allocation import global_
from slimtune.sparsity.weight_gates import Compat, WeightGates

OFFICIAL_INPUTS = 3
"""What that code's counter of the ramp goes up by each step: the number of the tokenizer's outputs."""


class Backward(Protocol):
    """Run forward and backward passes on a batch, each within `around()`, and return the mean loss."""

    def __call__(self, model: nn.Module, batch: Any, around: Callable[[], AbstractContextManager[Any]], /) -> float: ...


@dataclass(frozen=True)
class TicketSpec:
    """How masks are searched; the published values for SST-2, but for the number of steps (there 20 epochs).

    strength: lambda. quiet, ramp: shares of the steps in which lambda is 0, and then rises. start: the gates' first
    value. rows, columns: the block that shares a gate. clip: largest norm of the gates' gradient of the loss; that of
    R comes behind it. compat="official": the ramp runs three times as fast, `clip` goes over the stale gradients of all
    parameters, and R and coarse gates are as in WeightGates.
    """

    steps: int
    learning_rate: float = 0.1
    weight_decay: float = 1e-6
    warmup: float = 0.1
    strength: float = 0.5
    quiet: float = 0.1
    ramp: float = 0.3
    start: float = 0.9
    rows: int = 1
    columns: int = 1
    clip: float | None = 1.0
    seed: int = 0
    compat: Compat = "paper"

    def __post_init__(self) -> None:
        shares = (self.warmup, self.quiet, self.ramp)
        if self.steps < 1 or self.learning_rate <= 0 or self.strength < 0 or not all(0 <= s <= 1 for s in shares):
            raise RecipeError(f"{self}: it needs a step or more, a rate above 0, a strength of 0 or more, and shares "
                              "between 0 and 1.")

    def strength_at(self, step: int) -> float:
        """lambda at a step, counted from 1.

        Example:
            >>> [TicketSpec(steps=100).strength_at(s) for s in (10, 25, 40)]
            [0.0, 0.25, 0.5]
        """
        done = step * (OFFICIAL_INPUTS if self.compat == "official" else 1)
        if self.ramp == 0:
            return self.strength * (done > self.quiet * self.steps)
        return self.strength * max(0.0, min(1.0, (done - self.quiet * self.steps) / (self.ramp * self.steps)))

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1: linear up from 0, then linear down to 0."""
        done, warm = step - 1, self.warmup * self.steps
        share = done / warm if done < warm else (self.steps - done) / max(self.steps - warm, 1e-12)
        return self.learning_rate * share


def search(model: nn.Module, paths: Sequence[str], batches: Iterable[Any], backward: Backward, spec: TicketSpec, *,
           report: Callable[[dict[str, float]], None] | None = None) -> WeightGates:
    """Learn gates on the matrices at `paths`; the model's weights, gradients and mode are left as they were.

    backward: gives the adversary: `lambda m, b, around: adversarial_backward(m, b, FreeLB(), around=around)`, with
    FreeLB(steps=1, start=0) the ablation without one. Returns the gates: `ticket(gates, 0.3)` draws from them.

    Errors: TrainError for a loss that is not finite, or batches that end before the last step.
    """
    generator = torch.Generator(next(iter(model.parameters())).device).manual_seed(spec.seed)
    gates = WeightGates(model, paths, rows=spec.rows, columns=spec.columns, start=spec.start, compat=spec.compat,
                        generator=generator)
    optimizer = torch.optim.AdamW(gates.log_alpha.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    step = 0
    with kept_modes(model), gates.open():
        model.train()
        for step, batch in enumerate(batches, 1):
            line = _step(gates, optimizer, backward, batch, spec, step)
            if report is not None:
                report(line)
            if step == spec.steps:
                break
    if step < spec.steps:
        raise TrainError(f"the batches ended after step {step} of {spec.steps}.", "Give more of them, or fewer steps.")
    return gates


def _step(gates: WeightGates, optimizer: torch.optim.Optimizer, backward: Backward, batch: Any, spec: TicketSpec,
          step: int) -> dict[str, float]:
    optimizer.zero_grad()
    loss = backward(gates.model, batch, gates.sampled)
    if not math.isfinite(loss):
        raise TrainError(f"step {step}: the loss of the search is {loss}.", "Lower the adversary's rate or the mask's.")
    norm = gates.clip(spec.clip if spec.clip is not None else math.inf)
    alive = gates.penalty()
    (spec.strength_at(step) * alive).backward()
    for group in optimizer.param_groups:
        group["lr"] = spec.rate_at(step)
    optimizer.step()
    return {"step": step, "loss": loss, "alive": alive.item(), "norm": norm}


def ticket(gates: WeightGates, sparsity: float) -> dict[str, Tensor]:
    """Masks of the weights by parameter path: exactly floor(sparsity * n) of all n gates are drawn out.

    The ranking is that of sigmoid(log_alpha), without the ties of its rounding.
    """
    return {path: gates.spread(mask) for path, mask in global_(gates.scores(), sparsity).items()}


def state_names(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks as `Delta.set_masks` takes them: `own.<path>`."""
    return {f"own.{path}": mask for path, mask in masks.items()}
