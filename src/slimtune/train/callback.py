"""DeltaCallback: for people who keep their own `transformers.Trainer`; Flow: what `fit` adds to its loop."""
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slimtune.core.delta import Delta
from slimtune.core.mask import apply_masks, mask_gradients
from slimtune.train.guard import Finite, Guard
from slimtune.train.journal import Journal
from slimtune.train.signals import Signals
from slimtune.train.spec import TrainSpec, more_is_better

log = logging.getLogger("slimtune")


class DeltaCallback(TrainerCallback):
    """`Trainer(model=delta.model, callbacks=[DeltaCallback(delta)], ...)`: checks, masks and saves the delta.

    Every checkpoint-N gets a folder `delta`, written atomically, which `slimtune.load` reads. The run fails
    when a tensor of the delta does not move at first, or a gradient is not finite.

    Limits: the rest of checkpoint-N stays Trainer's: the whole model, pickled optimizer state, not atomic. A
    killed save may leave a checkpoint that Trainer cannot resume from; `delta` in it is whole or not there. A
    loss that is not finite is noticed by its gradient. DeltaTrainer has none of these limits.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta, self.guard = delta, Guard(delta)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.guard.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        step = state.global_step + 1
        finite = Finite(args.output_dir)
        for name, p in self.delta.named_parameters():
            if p.grad is not None:
                finite.check(p.grad.sum(), f"gradient of {name}", step)
        mask_gradients(self.delta)
        self.guard.before_step(step, optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        apply_masks(self.delta)
        self.guard.after_step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.delta.save(folder / "delta")
            log.info("saved %s", folder / "delta")


class Flow(TrainerCallback):
    """The journal, the report, patience, signals, and an evaluation at the end."""

    settled = 0
    """The step from which on evaluations count for patience."""

    def __init__(self, spec: TrainSpec, validated: bool, journal: Journal,
                 report: Callable[[dict[str, Any]], None] | None, signals: Signals) -> None:
        self.spec, self.validated, self.journal, self.signals = spec, validated, journal, signals
        self.report = report or (lambda event: None)

    def _tell(self, event: str, state: Any, **more: Any) -> None:
        self.report({"event": event, "step": state.global_step, "steps": state.max_steps, **more})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("start", state)
        if self._patience_is_over(state):                   # a run that had stopped early is resumed
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Augmentation depends on the epoch; accelerate does not tell the data of an epoch that is resumed inside."""
        tell = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if tell is not None:
            tell(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("step", state)
        last = state.global_step >= state.max_steps
        if last:
            control.should_log = True
            control.should_evaluate = self.validated
        if self.signals.told:
            self._stop(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:                         # transformers' closing line; times are not metrics
            return
        line = {"step": state.global_step, **logs}
        self.journal.add(line)
        self._tell("evaluate" if any(key.startswith("eval_") for key in logs) else "log", state, **line)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._patience_is_over(state):
            control.should_training_stop = control.should_save = True
        if self.signals.told:
            self._stop(control)

    def _patience_is_over(self, state: Any) -> bool:
        """Whether the last evaluations brought no new best: told by the history, which is resumed."""
        if self.spec.patience is None:
            return False
        key, sign = f"eval_{(self.spec.best or '').removeprefix('eval_')}", 1 if more_is_better(self.spec) else -1
        best, count = -math.inf, 0
        for value in (sign * line[key] for line in state.log_history
                      if key in line and line["step"] >= self.settled):
            count = 0 if value > best else count + 1
            best = max(best, value)
        return count >= self.spec.patience

    def _stop(self, control: Any) -> None:
        control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("save", state)
