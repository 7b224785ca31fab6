"""DeltaTrainer: transformers' Trainer that trains, saves and resumes the delta alone, atomically."""
import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from slimtune.core.delta import Delta
from slimtune.core.mask import apply_masks, mask_gradients
from slimtune.core.store import describe
from slimtune.errors import DeltaError, TrainError, listing, suggest
from slimtune.objectives.distillation import Objective
from slimtune.train.checkpoint import (
    Checkpoint,
    last_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from slimtune.train.features import Features
from slimtune.train.guard import Finite, Guard
from slimtune.train.predict import autocast, items
from slimtune.train.state import (
    adamw,
    delta_state,
    kept_rng,
    load_delta_state,
    load_optimizer_state,
    load_scheduler_state,
    optimizer_state,
    rng_state,
    scheduler_state,
    set_rng_state,
)

log = logging.getLogger("slimtune")


class DeltaTrainer(Trainer):
    """`transformers.Trainer` for a delta: `DeltaTrainer(delta, args, train_dataset=...)`, then `train()`.

    The model stays the plain backbone. The optimizer holds delta.parameters() alone. A checkpoint is one
    verified folder of the delta and its training state, without pickle (see `slimtune.train.checkpoint`);
    `train(resume_from_checkpoint=True)` goes on from the newest that verifies, bitwise as if it had not been
    stopped, as long as the collator draws no random numbers. When `metric_for_best_model` is set, each new
    best is saved. With gradient accumulation each example, or scored token, weighs the same, whatever the
    model's own loss does with `num_items_in_batch`.

    Not supported: DeepSpeed, FSDP, pushing to the hub (TrainError). `total_flos` is not counted.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, delta: Delta, args: TrainingArguments, *, head_learning_rate: float | None = None,
                 precision: str = "float32", evaluator: Callable[[], Mapping[str, float]] | None = None,
                 facts: Mapping[str, Any] | None = None, features: Callable[[], Features] | None = None,
                 objective: Objective | None = None, **options: Any) -> None:
        """head_learning_rate, precision: as in TrainSpec. evaluator: gives the metrics in place of Trainer's
        evaluation loop. facts: JSON that is kept in each checkpoint. features: gives, when the first step begins,
        what stands in for the frozen part; the data is then `Numbered`. objective: of (inputs, outputs, task loss),
        what is minimised. options: those of Trainer."""
        for name in ("deepspeed", "fsdp", "push_to_hub"):
            if getattr(args, name):
                raise TrainError(f"DeltaTrainer does not support {name}.", "Leave it out of the arguments.")
        self.delta, self.head_learning_rate, self.precision = delta, head_learning_rate, precision
        self.evaluator, self.facts, self.features = evaluator, dict(facts or {}), features
        self.objective = objective
        if features is not None and (args.world_size > 1 or args.n_gpu > 1):
            raise TrainError("a feature cache is read by one process on one device.", "Train without train.cache.")
        self.folder = Path(args.output_dir or "trainer_output")
        self.finite, self.keep = Finite(self.folder), args.save_total_limit
        self._resumed: Checkpoint | None = None
        args = copy.copy(args)
        if args.data_seed is None:                          # or the order depends on what was seeded before train()
            args.data_seed = args.seed
        args.save_total_limit = None                        # with 1, Trainer deletes the last step for the best
        args.logging_nan_inf_filter = False                 # it hides what `Finite` must see
        super().__init__(delta.model, args, **options)      # type: ignore[arg-type]
        if self.compute_loss_func is not None:
            self.loss_is_scaled_for_ga = None               # type: ignore[assignment]
        self.add_callback(_Watch(self))

    def make_guard(self) -> Guard:
        """What watches the first steps."""
        return Guard(self.delta)

    # what is optimised

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            self.optimizer = adamw(self.delta, lr=args.learning_rate, head_lr=self.head_learning_rate,
                                   weight_decay=args.weight_decay, eps=args.adam_epsilon,
                                   betas=(args.adam_beta1, args.adam_beta2))
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return autocast(self.delta.model, self.precision)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.compute_loss_func is not None:
            return super()._get_num_items_in_batch(batch_samples, device)
        return sum(items(self.delta.model, batch) for batch in batch_samples)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        """The model's mean loss, times this batch's share of the terms of the whole step."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        loss, own = getattr(outputs, "loss", None), items(self.delta.model, inputs)
        if loss is None:
            raise TrainError(f"{type(self.delta.model).__name__} returned no loss.",
                             f"The collator gives: {listing(inputs)}. Does it give labels?")
        if own == 0:                                        # the mean of nothing is NaN
            loss = outputs.logits.sum() * 0.0
        elif model.training:
            loss = loss if self.objective is None else self.objective(inputs, outputs, loss)
            loss = loss if (extra := self.delta.penalty()) is None else loss + extra
        if own and num_items_in_batch is not None and num_items_in_batch != own:
            loss = loss * (own / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with self.features()(inputs) if self.features is not None else nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.after_backward()
        self.finite.check(loss, "loss", self.state.global_step + 1)
        return loss

    def after_backward(self) -> None:
        """What is done with the gradients of a forward pass."""
        mask_gradients(self.delta)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(list(self.delta.parameters()), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(list(self.delta.parameters()), float("inf"))
        self.finite.check(grad_norm, "norm of the gradient", self.state.global_step + 1)
        return grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0                                            # 6 N D is not what a frozen backbone costs

    # how it is judged

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:
        """As Trainer's; the random generators are left as they were, so that evaluating changes no run."""
        with kept_rng():
            if self.evaluator is None or eval_dataset is not None:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is not None:
            key = name if name.startswith("eval_") else f"eval_{name}"
            if key not in metrics:
                names = [k.removeprefix("eval_") for k in metrics]
                raise TrainError(f"best: the evaluation has no metric '{name}'.", f"It has: {listing(names)}",
                                 suggest(name, names))
        new = super()._determine_best_metric(metrics, trial)
        if new and self.args.save_strategy != "no":
            self.control.should_save = True
        return new

    # how it is saved

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the delta's folder; by default `delta` in the output folder."""
        if self.args.should_save:
            self.delta.save(output_dir or self.folder / "delta")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial))
        best = self.state.best_global_step
        if best:                                            # as it will be once this save is in place
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        try:
            path = write_checkpoint(folder, self._checkpoint())
        except DeltaError as error:
            good = last_checkpoint(folder)
            raise TrainError(f"step {self.state.global_step}: the checkpoint was not saved: {error.what}",
                             f"Last good checkpoint: {good}; the run resumes from it." if good else
                             "No checkpoint had been saved.") from error
        log.info("saved %s", path)
        if self.keep:
            prune(path, self.keep, folder / f"checkpoint-{best}" if best else None)

    def _checkpoint(self) -> Checkpoint:
        optimizer, groups = optimizer_state(self.delta, self.optimizer)
        rng, numbers = rng_state()
        loop = {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        facts = {"delta": describe(self.delta, self.delta.methods), "optimizer": groups, "rng": numbers,
                 "scheduler": scheduler_state(self.lr_scheduler), "loop": loop, "run": self.facts}
        state = json.dumps(dataclasses.asdict(self.state), sort_keys=True, indent=1) + "\n"
        tensors, facts["masks"] = delta_state(self.delta)
        return Checkpoint(self.state.global_step, tensors, optimizer, rng, facts, state)

    # how it goes on

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None,
              ignore_keys_for_eval: list[str] | None = None) -> Any:
        """As Trainer's. True resumes from the newest checkpoint that verifies. Errors: TrainError if none does."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.folder)
            if resume_from_checkpoint is None:
                raise TrainError(f"{self.folder}: no checkpoint to resume from.")
        path = str(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(path, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False
            self._resumed = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = read_checkpoint(resume_from_checkpoint)
        load_delta_state(self.delta, self._resumed)

    def _init_training_state(self, *args: Any, **options: Any) -> tuple[int, int]:
        epochs = super()._init_training_state(*args, **options)
        self.state.compute_steps(self.args, self.state.max_steps)   # of this call, not of the one that saved
        if self._resumed is not None and self.state.best_global_step:
            best = self.folder / f"checkpoint-{self.state.best_global_step}"  # the run may have moved
            self.state.best_model_checkpoint = str(best)
            try:
                read_checkpoint(best)
            except DeltaError as error:
                log.warning("the best checkpoint is lost, another will be chosen from here on: %s", error.what)
                self.state.best_model_checkpoint = self.state.best_global_step = self.state.best_metric = None
        return epochs

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Not begun by a run that is over: Trainer would take one more step when a finished run is resumed."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            load_optimizer_state(self.delta, self.optimizer, self._resumed.optimizer, self._resumed.facts["optimizer"])
            load_scheduler_state(self.lr_scheduler, self._resumed.facts["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Only float16 has one, and it is not supported."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            set_rng_state(self._resumed.rng, self._resumed.facts["rng"])

    def _load_best_model(self) -> None:
        """Errors: DeltaError when the best checkpoint does not verify any more: it is never silently another."""
        load_delta_state(self.delta, read_checkpoint(self.state.best_model_checkpoint))  # type: ignore[arg-type]


class _Watch(TrainerCallback):
    """The guard, and what Trainer forgets when it resumes."""

    def __init__(self, trainer: DeltaTrainer) -> None:
        self.trainer, self.guard = trainer, trainer.make_guard()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resumed = self.trainer._resumed
        if resumed is None:
            self.guard.begin()
            return
        loop = resumed.facts["loop"]
        self.trainer._tr_loss += loop["loss"]
        self.trainer._globalstep_last_logged = loop["last_logged"]
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.before_step(state.global_step + 1, self.trainer.optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        apply_masks(self.trainer.delta)
        self.guard.after_step(state.global_step + 1)
