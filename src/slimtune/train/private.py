"""PrivateTrainer: DP-SGD in Trainer's loop. A step draws its examples by itself; the loader only counts steps."""
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from slimtune.core.delta import Delta
from slimtune.data.examples import Examples
from slimtune.data.imagerows import ImageRows
from slimtune.errors import TrainError
from slimtune.privacy.draws import new_secret, poisson
from slimtune.privacy.guards import check_delta, probe
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.step import PrivateStep
from slimtune.train.checkpoint import Checkpoint
from slimtune.train.guard import Guard
from slimtune.train.predict import on_device
from slimtune.train.state import kept_rng
from slimtune.train.trainer import DeltaTrainer

SECRET = "privacy.secret"
"""Its name among the generators' states in a checkpoint."""
PROBED = 3


class PrivateTrainer(DeltaTrainer):
    """DeltaTrainer whose gradients are clipped for each example and noised.

    A Trainer step is one Poisson draw of expected size ledger.batch, run in batches of `physical` examples. Loss in
    the log is that of the examples drawn, without noise: metrics.jsonl and the checkpoints are not for publishing.

    Errors: MethodError for a model or method that couples examples; TrainError on more than one device.
    """

    def __init__(self, delta: Delta, args: TrainingArguments, *, ledger: Ledger, physical: int, **options: Any) -> None:
        super().__init__(delta, args, **options)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise TrainError("private training runs in one process on one device.", "Start one process, with one GPU.")
        self.ledger, self.physical, self.secret = ledger, physical, new_secret(ledger.spec.seed)
        self.private: PrivateStep | None = None

    # what a step is

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(list(range(math.ceil(self.ledger.examples / self.ledger.batch))),  # type: ignore[arg-type]
                          batch_size=1, collate_fn=lambda steps: {"step": torch.tensor(steps)})

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.private is None:
            self.private = PrivateStep(self.delta, optimizer, self.ledger, self.secret)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        private, step = self.private, self.state.global_step + 1
        assert private is not None
        model.train()
        drawn = poisson(self.secret, step, self.ledger.examples, self.ledger.rate)
        total = torch.zeros((), device=self.args.device)
        private.begin()
        drawn = self._by_length(drawn)
        for start in range(0, len(drawn), self.physical):
            batch = self._batch(drawn[start:start + self.physical])
            total += private.add(batch, self.compute_loss_context_manager).sum()
        self.finite.check(total, "loss", step)
        private.finish(step, watch=bool(self.watched.waiting))
        return total / max(len(drawn), 1)

    def _by_length(self, rows: list[int]) -> list[int]:
        """Texts of like length run together, which pads less; a sum has no order."""
        data = self.train_dataset
        if not isinstance(data, Examples) or isinstance(data.rows, ImageRows):
            return rows
        return sorted(rows, key=lambda i: (len(data.rows[i]["input_ids"]), i))

    def _batch(self, rows: list[int]) -> dict[str, Any]:
        data: Any = self.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(self.state.epoch or 0))
        found = data.__getitems__(rows) if hasattr(data, "__getitems__") else [data[i] for i in rows]
        return on_device(dict(self.data_collator(found)), self.delta.model)

    # how it is watched

    def make_guard(self) -> Guard:
        self.watched = _PrivateGuard(self)
        return self.watched

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None,
              ignore_keys_for_eval: list[str] | None = None) -> Any:
        check_delta(self.delta)
        if not resume_from_checkpoint:
            with kept_rng():
                self.delta.model.train()
                probe(self.delta, self._batch(list(range(min(PROBED, self.ledger.examples)))))
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.private is not None:
                self.private.close()

    # how it is kept

    def _checkpoint(self) -> Checkpoint:
        assert self.private is not None
        made = super()._checkpoint()
        made.rng[SECRET] = self.secret
        made.facts["privacy"] = {**self.ledger.state(), "sigma": self.ledger.sigma, "clip": self.private.clip}
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._resumed is not None:
            assert self.private is not None
            facts: Mapping[str, Any] = self._resumed.facts["privacy"]
            self.ledger.load(facts, self._resumed.step)  # type: ignore[arg-type]
            self.secret = self.private.secret = self._resumed.rng[SECRET]
            self.private.clip = facts["clip"]


class _PrivateGuard(Guard):
    """Noise gives every tensor a gradient: only those that examples gave one count as seen."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        super().__init__(trainer.delta)
        self.trainer = trainer

    def before_step(self, step: int, optimizer: Any) -> None:
        if not self.waiting:
            return
        seen, private = set(self.seen), self.trainer.private
        assert private is not None
        live = private.live
        super().before_step(step, optimizer)
        self.seen = seen | live
        if not live:  # nothing was drawn
            self.before = {}
