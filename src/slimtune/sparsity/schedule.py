"""Schedule: when masks are drawn, to what sparsity, and what the learning rate does meanwhile.

    one shot     before the first step; in R rounds, a share (1 - s)^(r / R) lives after round r
    cubic        s(t) = s_i + (s_f - s_i) (1 - (1 - clip((t - t0) / (t1 - t0), 0, 1))^3)
    sr_ste       anew at every step from the first on, with a gradient for what does not live as well
    iterative    a share (1 - p)^k lives after k rounds of training, pruning and rewinding (see tickets.py)

and learning-rate rewinding: with T steps, w of warm-up, masks drawn every r steps in [p0, p1), P = p1 - p0, N = T - P,

    lambda(t) = t / w                                    t < w
                (N - t + floor((t - p0) / r) r) / (N - w)    p0 <= t < p1
                (T - P [t < p0] - t) / (N - w)               otherwise, and at least 0

which stays near its peak while masks change, and above 1 there, and then decays to 0.

Source: Zhu, Gupta, 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1; of one shot in rounds, Tanaka et
al., 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow", arXiv 2006.05467,
algorithm 1; of the rewound rate, Zafrir et al., 2021, "Prune Once for All", arXiv 2111.05754, and its code; of SR-STE,
Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010, and its
code, which has lambda.
"""
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slimtune.errors import RecipeError

Moment: TypeAlias = Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, le=1)]
"""A whole number of steps, or a share of the run: 1 is one step, 1.0 the whole run."""


def cubic(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """s(t).

    Example:
        >>> [round(cubic(t, 0, 50_000, 0.9), 6) for t in (0, 10_000, 25_000, 60_000)]
        [0.0, 0.4392, 0.7875, 0.9]
    """
    share = min(max((step - begin) / (end - begin), 0.0), 1.0) if end > begin else float(step >= end)
    return initial + (final - initial) * (1 - (1 - share) ** 3)


def geometric(sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each round of a one-shot pruning in rounds.

    Example:
        >>> [round(s, 3) for s in geometric(0.9, 3)]
        [0.536, 0.785, 0.9]
    """
    return [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)] + [sparsity]


def iterative(rate: float, rounds: int) -> list[float]:
    """The sparsity after each round that removes `rate` of what lives.

    Example:
        >>> [round(1 - s, 4) for s in iterative(0.2, 4)]
        [0.8, 0.64, 0.512, 0.4096]
    """
    return [1 - (1 - rate) ** k for k in range(1, rounds + 1)]


def rewound(step: int, steps: int, warmup: int, begin: int, end: int, every: int) -> float:
    """lambda(t), the multiple of the learning rate.

    Errors: RecipeError when warm-up and pruning leave no steps to decay in.
    Example:
        >>> [round(rewound(t, 100_000, 1000, 0, 50_000, 1000), 6) for t in (500, 1500, 75_000)]
        [0.5, 1.010204, 0.510204]
    """
    pruning = end - begin
    rest = steps - pruning
    if rest <= warmup:
        raise RecipeError(f"rewinding: {warmup} steps of warm-up and {pruning} of pruning fill the {steps} of the run.",
                          "End the pruning earlier, or train longer.")
    if step < warmup:
        return step / warmup
    if begin <= step < end:
        return max((rest - step + (step - begin) // every * every) / (rest - warmup), 0.0)
    return max((steps - (pruning if step < begin else 0) - step) / (rest - warmup), 0.0)


class _Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class OneShot(_Schedule):
    """All at once, before the first step; in `rounds`, scored anew for each."""

    name: Literal["one_shot"] = "one_shot"
    rounds: int = Field(default=1, ge=1, description="rounds of scoring and pruning, to ever higher sparsities")


class Cubic(_Schedule):
    """Gradual pruning: masks are drawn anew every few steps, to a sparsity that rises as a cubic, and then stay.

    Times are steps, or shares of the run: 1 is one step, 1.0 the whole run.
    """

    name: Literal["cubic"] = "cubic"
    begin: Moment = Field(default=0.0, description="when the sparsity begins to rise")
    end: Moment = Field(default=0.5, description="when it is reached")
    until: Moment | None = Field(default=None, description="masks are still drawn anew until then; by default end")
    every: Moment = Field(default=0.01, description="steps between masks")
    initial: float = Field(default=0.0, ge=0, lt=1, description="the sparsity at the beginning")
    reenter: bool = Field(default=True, description="a pruned weight keeps its dense value, by which it is scored and "
                          "may come back while masks change; false lets the dead stay dead")

    def ramp(self, steps: int, final: float) -> "Ramp":
        """The schedule in steps of a run. Errors: RecipeError for one that the run is too short for."""
        begin, end = _at(self.begin, steps), _at(self.end, steps)
        until = end if self.until is None else _at(self.until, steps)
        if not begin <= end <= until <= steps:
            raise RecipeError(f"cubic schedule: it begins at step {begin}, ends at {end} and draws masks until "
                              f"{until}, in a run of {steps} steps.", "Choose begin <= end <= until, within the run.")
        return Ramp(begin=begin, end=end, until=until, every=max(_at(self.every, steps), 1), initial=self.initial,
                    final=final, settled=until)


class SRSTE(_Schedule):
    """Sparse from the first step on, by masks that are drawn anew from dense weights; what is dead is trained too:

        W <- W - step(dL/dW' + lambda (1 - m) * W),    W' = m * W

    The gradient goes straight through the mask, and the second term draws what does not live towards 0, so that masks
    come to rest. Meant for n:m; with another granularity it holds one sparsity.

    Example:
        >>> w, raw, live = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([True, False])
        >>> SRSTE(strength=0.1).gradient(raw, live, w)
        tensor([0.5000, 0.6000])
    """

    name: Literal["sr_ste"] = "sr_ste"
    strength: float = Field(default=2e-4, ge=0, description="lambda; 0 is the plain straight-through estimator")
    until: Moment = Field(default=1.0, description="masks are drawn anew until then, and stay")
    every: Moment = Field(default=1, description="steps between masks")
    reenter: ClassVar[bool] = True

    def ramp(self, steps: int, final: float) -> "Ramp":
        """The schedule in steps of a run. Errors: RecipeError when masks are drawn beyond it."""
        if (until := _at(self.until, steps)) > steps:
            raise RecipeError(f"sr_ste schedule: it draws masks until step {until}, in a run of {steps} steps.",
                              "Choose an until within the run.")
        return Ramp(begin=0, end=0, until=until, every=max(_at(self.every, steps), 1), initial=final, final=final,
                    settled=0)

    def gradient(self, raw: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """What the dense weight takes. Shapes: raw = dL/dW', mask, weight and result alike."""
        return torch.where(mask, raw, raw + self.strength * weight)


class Ramp(_Schedule):
    """A cubic schedule in steps."""

    begin: int
    end: int
    until: int
    every: int
    initial: float
    final: float
    settled: int
    """From this step on the masks are as sparse as they are to be."""

    def due(self, step: int) -> bool:
        """Whether masks are drawn when so many steps are done."""
        return self.begin <= step <= self.until and (
            (step - self.begin) % self.every == 0 or step in (self.end, self.until))

    def at(self, step: int) -> float:
        """The sparsity when so many steps are done."""
        return cubic(step, self.begin, self.end, self.final, self.initial)


def _at(moment: float, steps: int) -> int:
    return moment if isinstance(moment, int) else round(moment * steps)


Schedule: TypeAlias = Annotated[OneShot | Cubic | SRSTE, Field(discriminator="name")]
