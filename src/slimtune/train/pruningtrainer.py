"""PruningTrainer: DeltaTrainer with masks that change while it trains."""
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from slimtune.core.delta import Delta
from slimtune.sparsity.schedule import rewound
from slimtune.train.callback import Flow
from slimtune.train.checkpoint import Checkpoint
from slimtune.train.pruning import Pruner
from slimtune.train.trainer import DeltaTrainer


class PruningTrainer(DeltaTrainer):
    """DeltaTrainer whose delta a Pruner masks; rewinding: the learning rate waits for the last masks.

    The best checkpoint is one that is as sparse as it is to be, and patience counts from there.
    """

    def __init__(self, delta: Delta, args: TrainingArguments, *, pruner: Pruner, rewinding: bool = False,
                 **options: Any) -> None:
        super().__init__(delta, args, **options)
        self.pruner, self.rewinding, self._hooked = pruner, rewinding, False
        self.add_callback(_Begin(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if not self._hooked:
            optimizer.register_step_pre_hook(lambda *_: self.pruner.enter())
            optimizer.register_step_post_hook(lambda *_: self.pruner.leave(self.state.global_step + 1))
            self._hooked = True
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        ramp = self.pruner.schedule(num_training_steps)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Flow):
                callback.settled = ramp.settled
        if not self.rewinding or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        given = (num_training_steps, warmup, ramp.begin, ramp.end, ramp.every)
        rewound(0, *given)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer,
                                                              lambda step: rewound(step, *given))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def after_backward(self) -> None:
        if self.accelerator.sync_gradients:  # before, gradients of what does not live add up as well
            self.pruner.watch(self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (now := self.pruner.sparsity) is not None:
            logs["sparsity"] = round(now, 6)
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        assert self.pruner.ramp is not None
        return self.state.global_step >= self.pruner.ramp.settled and super()._determine_best_metric(metrics, trial)

    def _checkpoint(self) -> Checkpoint:
        made = super()._checkpoint()
        made.delta.update(self.pruner.tensors())
        made.facts["pruning"] = self.pruner.facts()
        return made


class _Begin(TrainerCallback):
    """Starts the pruner, or lets it go on."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resumed = self.trainer._resumed
        if resumed is None:
            self.trainer.pruner.begin()
        else:
            self.trainer.pruner.load(resumed.delta, resumed.facts["pruning"])
