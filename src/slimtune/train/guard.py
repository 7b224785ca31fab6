"""Guard: a run that trains nothing, or whose loss is not finite, fails at once and says which tensor."""
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.delta import Delta
from slimtune.errors import SlimtuneError, TrainError, listing
from slimtune.sparsity.structure import silenced
from slimtune.train.checkpoint import last_checkpoint

log = logging.getLogger("slimtune")


class Interrupted(SlimtuneError):  # noqa: N818
    """A run that was told to stop (Ctrl-C, SIGTERM), and saved a checkpoint that resumes it."""

    exit_code = 3


class Guard:
    """Watches the first optimizer steps of a delta.

    After the first backward pass every trained tensor must have a gradient that is there and not all zero;
    after the first step with a learning rate above 0 every one must have changed. One with a gradient too
    small to change it is given time until the learning rate is at its peak. Tensors that a method names in
    `silent` are exempt, and reported.

    Errors: TrainError that names the tensors.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.exempt: dict[str, str] = {}
        self.waiting: dict[str, torch.nn.Parameter] = {}
        self.seen: set[str] = set()
        self.before: dict[str, bytes] = {}
        self.rates: dict[int, tuple[float, float]] = {}

    def begin(self) -> None:
        """Start to watch: at step 0 of a run."""
        self.waiting = dict(self.delta.named_parameters())
        dead = [name for name, mask in self.delta.masks.items() if not bool(mask.any())]
        self.exempt = {**self.delta.resting(), **silenced(self.delta), **dict.fromkeys(dead, "nothing of it lives")}
        self.waiting = {name: p for name, p in self.waiting.items() if name not in self.exempt}
        self.seen = set()
        for why in sorted(set(self.exempt.values())):
            names = [name for name, reason in self.exempt.items() if reason == why]
            log.info("not checked for a first gradient: %s: %s", listing(names, 4), why)

    def before_step(self, step: int, optimizer: Any) -> None:
        """After the backward pass of a step (from 1), before the optimizer's."""
        if not self.waiting:
            return
        lost = [name for name, p in self.waiting.items() if p.grad is None]
        if lost:
            raise TrainError(f"step {step}: no gradient reaches {listing(lost, 8)}.",
                             "The loss does not depend on it: the delta is not active, is merged, or its module is "
                             "not used by this model's forward pass.", self._unsound())
        self.rates = {id(p): (float(group["lr"]), float(group.get("initial_lr", group["lr"])))
                      for group in optimizer.param_groups for p in group["params"]}
        self.seen |= {name for name, p in self.waiting.items()
                      if name not in self.seen and bool(p.grad.detach().any())}  # type: ignore[union-attr]
        if strange := [name for name, p in self.waiting.items() if id(p) not in self.rates]:
            raise TrainError(f"step {step}: the optimizer does not hold {listing(strange, 8)}.",
                             "Make it from delta.parameters().")
        self.before = {name: digest(p) for name, p in self.waiting.items() if self.rates[id(p)][0] > 0}

    def after_step(self, step: int) -> None:
        """After the optimizer's step."""
        if not self.waiting:
            return
        idle, small = [], []
        for name, old in self.before.items():
            rate, peak = self.rates[id(self.waiting[name])]
            if name not in self.seen:
                idle.append(name)
            elif digest(self.waiting[name]) != old:
                del self.waiting[name]
            elif rate >= peak * (1 - 1e-6):
                small.append(name)
        self.before = {}
        if idle:
            raise TrainError(f"step {step}: the gradient of {listing(idle, 8)} is 0 everywhere.", self._unsound())
        if small:
            dtypes = {str(self.waiting[name].dtype).removeprefix("torch.") for name in small}
            raise TrainError(f"step {step}: {listing(small, 8)} did not move, though there is a gradient.",
                             f"The update is smaller than {' or '.join(sorted(dtypes))} can tell: raise the learning "
                             "rate, or load the model in float32.")

    def _unsound(self) -> str:
        names = ", ".join(type(method).__name__ for method in self.delta.methods)
        return f"A method whose tensors rest at first says so in its `silent` ({names} does not for these)."


class Finite:
    """Stops a run whose loss or gradient is NaN or infinite."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def check(self, value: Tensor | float | None, what: str, step: int) -> None:
        """Errors: TrainError that names the step and the last good checkpoint."""
        if value is None or bool(torch.isfinite(torch.as_tensor(value)).all()):
            return
        good = last_checkpoint(self.folder)
        number = float(torch.as_tensor(value).float().mean())
        raise TrainError(f"step {step}: the {what} is {number}.",
                         f"Last good checkpoint: {good}." if good else "No checkpoint had been saved.",
                         "Lower the learning rate, raise warmup, or set clip; or look for damaged inputs or labels.")


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's bits."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).digest()
