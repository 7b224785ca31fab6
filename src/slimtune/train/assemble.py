"""The trainer of a TrainSpec: transformers' arguments, and what stands beside them."""
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.delta import Delta
from slimtune.data.examples import Collate
from slimtune.objectives.distillation import Objective
from slimtune.privacy.ledger import Ledger
from slimtune.train.features import Features, Numbered, numbered
from slimtune.train.journal import Journal
from slimtune.train.pruning import Pruner
from slimtune.train.signals import Signals
from slimtune.train.spec import TrainSpec, more_is_better

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from slimtune.train.trainer import DeltaTrainer

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup",
              "rewinding": "linear"}  # PruningTrainer makes its own
_SPREAD = 100_003
"""accelerate orders epoch e by seed + e: without it, seed 1 would begin with seed 0's second epoch."""


def make_trainer(delta: Delta, data: Any, validation: Any, judge: Callable[[], dict[str, float]], collate: Collate,
                 spec: TrainSpec, folder: Path, facts: Mapping[str, Any], journal: Journal,
                 report: Callable[[dict[str, Any]], None] | None, signals: Signals,
                 features: Callable[[], Features] | None = None, ledger: Ledger | None = None,
                 pruner: Pruner | None = None, objective: Objective | None = None) -> "DeltaTrainer":
    """The trainer of a spec; `judge` scores the validation data, `ledger` makes it private, `pruner` moves masks."""
    from transformers import PrinterCallback

    from slimtune.train.callback import Flow
    from slimtune.train.trainer import DeltaTrainer

    validated = validation is not None
    if features is not None:
        data, collate = Numbered(data), numbered(collate)
    made: Any = DeltaTrainer
    if ledger is not None:
        from slimtune.train.private import PrivateTrainer

        made = functools.partial(PrivateTrainer, ledger=ledger, physical=spec.batch_size)
    if pruner is not None:
        from slimtune.train.pruningtrainer import PruningTrainer

        made = functools.partial(PruningTrainer, pruner=pruner, rewinding=spec.schedule == "rewinding")
    trainer = made(delta, arguments(spec, folder, len(data), validated, ledger.batch if ledger else None),
                   train_dataset=data, eval_dataset=validation, data_collator=collate, evaluator=judge, facts=facts,
                   features=features, objective=objective, precision=spec.precision,
                   head_learning_rate=spec.head_learning_rate,
                   callbacks=[Flow(spec, validated, journal, report, signals)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(spec: TrainSpec, folder: Path, examples: int, validated: bool,
              batch: int | None = None) -> "TrainingArguments":
    """transformers' arguments of a spec. batch: examples of a step, if they are not those of a forward pass."""
    from transformers import TrainingArguments

    epoch = math.ceil(math.ceil(examples / (batch or spec.batch_size)) / spec.gradient_accumulation)
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
