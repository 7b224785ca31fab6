"""train: a thin subclass of transformers' Trainer, atomic checkpoints, and a guard against runs that train nothing."""
from typing import TYPE_CHECKING, Any

from slimtune.train.checkpoint import last_checkpoint
from slimtune.train.fit import TrainResult, fit
from slimtune.train.guard import Interrupted
from slimtune.train.predict import Predictions, evaluate, generated, logits, predict, token_losses
from slimtune.train.prunespec import PruneSpec
from slimtune.train.spec import TrainSpec

if TYPE_CHECKING:
    from slimtune.train.callback import DeltaCallback
    from slimtune.train.trainer import DeltaTrainer

__all__ = ["DeltaCallback", "DeltaTrainer", "Interrupted", "Predictions", "PruneSpec", "TrainResult", "TrainSpec",
           "evaluate", "fit", "generated", "last_checkpoint", "logits", "predict", "token_losses"]


def __getattr__(name: str) -> Any:
    """The classes that need transformers, which takes seconds to import, come when they are asked for."""
    if name == "DeltaTrainer":
        from slimtune.train.trainer import DeltaTrainer

        return DeltaTrainer
    if name == "DeltaCallback":
        from slimtune.train.callback import DeltaCallback

        return DeltaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
