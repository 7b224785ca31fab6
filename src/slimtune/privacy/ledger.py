"""Ledger: what a run may spend, what each step spends, and what is told of it."""
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimtune.errors import DeltaError, RecipeError, TrainError
from slimtune.privacy.extra import opacus
from slimtune.privacy.spec import PrivacySpec

log = logging.getLogger("slimtune")
TOLERANCE = 0.01
"""How far below the epsilon that is asked for the noise may stay."""


class Ledger:
    """The account of one run of `steps` Poisson-sampled Gaussian steps.

    examples: N, taken as known to everybody; batch: expected examples of a step, so that the rate is q = batch / N.

    Errors: RecipeError for a promise that cannot be kept.
    Example:
        >>> ledger = Ledger(PrivacySpec(noise_multiplier=1.0, delta=1e-5, accountant="rdp"), 1000, 10, 100)
        >>> ledger.rate, ledger.steps, ledger.spent()
        (0.01, 0, 0.0)
    """

    def __init__(self, spec: PrivacySpec, examples: int, batch: int, steps: int, sigma: float | None = None) -> None:
        """sigma: of a run that goes on, in place of a search."""
        if batch > examples:
            raise RecipeError(f"privacy.batch_size: {batch} examples of a step cannot be expected of {examples}.",
                              "By default it is train.batch_size.")
        if spec.delta >= 1 / examples:
            log.warning("privacy.delta: %s is not below 1 / examples (%.2g): it leaves room to publish one whole",
                        spec.delta, 1 / examples)
        self.spec, self.examples, self.batch, self.planned = spec, examples, batch, steps
        self.rate = batch / examples
        self.accountant = opacus("accountants").create_accountant(mechanism=spec.accountant)
        self.sigma = self._sigma() if sigma is None else sigma
        if spec.epsilon is not None and (whole := self.of(steps)) > spec.epsilon:
            raise RecipeError(f"privacy.noise_multiplier: {self.sigma} spends epsilon {whole:.3f} in {steps} steps, "
                              f"and privacy.epsilon is {spec.epsilon}.",
                              f"It takes {Ledger(self._searched(), examples, batch, steps).sigma:.4f}; or fewer steps, "
                              "or a smaller privacy.batch_size.")

    def _searched(self) -> PrivacySpec:
        return self.spec.model_copy(update={"noise_multiplier": None})

    def _sigma(self) -> float:
        if self.spec.noise_multiplier is not None:
            return self.spec.noise_multiplier
        try:
            sigma = self._found("rdp")
            if self.spec.accountant == "rdp":
                return sigma
            return self._lowered(sigma) if self.of(self.planned, sigma) <= self._target else self._found("prv")
        except (ValueError, RuntimeError) as error:
            raise RecipeError(f"privacy.epsilon: no noise keeps {self.spec.epsilon} over {self.planned} steps: {error}",
                              "Ask for more, train for fewer steps or with a smaller privacy.batch_size, or count "
                              "by privacy.accountant=rdp.") from None

    @property
    def _target(self) -> float:
        assert self.spec.epsilon is not None
        return self.spec.epsilon

    def _found(self, accountant: str) -> float:
        """Opacus' own search."""
        with _quiet():
            return opacus("accountants.utils").get_noise_multiplier(
                target_epsilon=self._target, target_delta=self.spec.delta, sample_rate=self.rate, steps=self.planned,
                accountant=accountant, epsilon_tolerance=min(TOLERANCE, self._target / 10))

    def _lowered(self, high: float) -> float:
        """Bisection below a noise that keeps the promise: Opacus' search of PRV begins where it takes long."""
        low = 0.0
        step = min(TOLERANCE, self._target / 10)
        while self._target - self.of(self.planned, high) > step and high - low > 1e-4 * high:
            middle = high * 0.9 if low == 0 else (low + high) / 2
            if self.of(self.planned, middle) <= self._target:
                high = middle
            else:
                low = middle
        return high

    # what is spent

    @property
    def steps(self) -> int:
        """Steps whose noise was added."""
        return sum(count for _, _, count in self.accountant.history)

    def charge(self) -> None:
        """One more step. Errors: TrainError beyond the steps that were planned; nothing is released then."""
        if self.steps >= self.planned:
            raise TrainError(f"privacy: {self.planned} steps were planned, and all are spent.",
                             "Begin a new run, whose epsilon adds to this one's.")
        self.accountant.step(noise_multiplier=self.sigma, sample_rate=self.rate)

    def spent(self) -> float:
        """Epsilon of the steps so far; infinite without noise."""
        return self.of(self.steps)

    def of(self, steps: int, sigma: float | None = None) -> float:
        """Epsilon of so many steps, by this ledger's noise or another."""
        sigma = self.sigma if sigma is None else sigma
        if steps == 0 or sigma == 0:
            return 0.0 if steps == 0 else math.inf
        account = opacus("accountants").create_accountant(mechanism=self.spec.accountant)
        account.history = [(sigma, self.rate, steps)]
        with _quiet():
            return float(account.get_epsilon(delta=self.spec.delta))

    # how it is kept

    def state(self) -> dict[str, Any]:
        """The accountant's history as JSON."""
        return {"accountant": self.spec.accountant, "history": [list(line) for line in self.accountant.history]}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state` at a step. Errors: DeltaError when it is of another run: nothing may be forgotten."""
        history = [(float(s), float(q), int(n)) for s, q, n in state["history"]]
        if state["accountant"] != self.spec.accountant or sum(n for _, _, n in history) != step or any(
                (s, q) != (self.sigma, self.rate) for s, q, _ in history):
            raise DeltaError(f"privacy: the checkpoint's ledger {history} is not that of step {step} of this run.",
                             f"It has sigma {self.sigma}, rate {self.rate} and accountant {self.spec.accountant}.")
        self.accountant.history = history

    def report(self) -> dict[str, Any]:
        """What stands in the delta's file, result.json and the card; epsilon is null without noise."""
        spent, spec = self.spent(), self.spec
        told = {"epsilon": spent if math.isfinite(spent) else None, "delta": spec.delta, "target": spec.epsilon,
                "noise_multiplier": self.sigma, "sample_rate": self.rate, "steps": self.steps,
                "accountant": spec.accountant, "clipping": spec.clipping, "clip": spec.clip, "sampling": "poisson",
                "batch_size": self.batch, "examples": self.examples, "neighbours": "one example more or less",
                "secure": spec.secure, "seed": "the operating system's" if spec.seed is None else "given",
                "opacus": importlib.metadata.version("opacus")}
        if spec.clipping == "adaptive":
            told |= {"quantile": spec.quantile, "count_noise": count_noise(spec, self.batch)}
        return told


def count_noise(spec: PrivacySpec, batch: int) -> float:
    """The deviation of the noise on the count of examples that were not clipped."""
    return batch / 20 if spec.count_noise is None else spec.count_noise


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus warns when the best order is the last it tries; the bound holds for any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
