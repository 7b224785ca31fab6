"""How `fit` drives transformers' loop: its arguments, when it evaluates, saves, logs and stops."""
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from slimtune.core.delta import Delta
from slimtune.data.examples import Collate
from slimtune.train.journal import Journal
from slimtune.train.signals import Signals
from slimtune.train.spec import TrainSpec, more_is_better
from slimtune.train.trainer import DeltaTrainer

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_SPREAD = 100_003
"""accelerate orders epoch e by seed + e: without it, seed 1 would begin with seed 0's second epoch."""


def make_trainer(delta: Delta, data: Any, validation: Any, judge: Callable[[], dict[str, float]], collate: Collate,
                 spec: TrainSpec, folder: Path, facts: Mapping[str, Any], journal: Journal,
                 report: Callable[[dict[str, Any]], None] | None, signals: Signals) -> DeltaTrainer:
    """The trainer of a spec; `judge` scores the validation data."""
    validated = validation is not None
    trainer = DeltaTrainer(delta, arguments(spec, folder, len(data), validated), train_dataset=data,
                           eval_dataset=validation, data_collator=collate, evaluator=judge, facts=facts,
                           precision=spec.precision, head_learning_rate=spec.head_learning_rate,
                           callbacks=[Flow(spec, validated, journal, report, signals)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(spec: TrainSpec, folder: Path, examples: int, validated: bool) -> TrainingArguments:
    """transformers' arguments of a spec."""
    epoch = math.ceil(math.ceil(examples / spec.batch_size) / spec.gradient_accumulation)
    evaluate = spec.eval_every or epoch
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=spec.epochs, max_steps=spec.steps or -1,
        per_device_train_batch_size=spec.batch_size, per_device_eval_batch_size=spec.eval_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation, learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay, warmup_steps=spec.warmup, lr_scheduler_type=_SCHEDULES[spec.schedule],
        max_grad_norm=spec.clip or 0.0, seed=spec.seed, data_seed=spec.seed * _SPREAD,
        logging_strategy="steps", logging_steps=spec.log_every,
        eval_strategy="steps" if validated else "no", eval_steps=evaluate if validated else None,
        save_strategy="steps", save_steps=spec.save_every or (evaluate if validated else epoch),
        save_total_limit=spec.keep, metric_for_best_model=spec.best, greater_is_better=more_is_better(spec),
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True, report_to="none")


class Flow(TrainerCallback):
    """The journal, the report, patience, signals, and an evaluation at the end."""

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
        for value in (sign * line[key] for line in state.log_history if key in line):
            count = 0 if value > best else count + 1
            best = max(best, value)
        return count >= self.spec.patience

    def _stop(self, control: Any) -> None:
        control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("save", state)
