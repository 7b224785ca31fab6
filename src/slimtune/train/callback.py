"""DeltaCallback: for people who keep their own `transformers.Trainer`."""
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slimtune.core.delta import Delta
from slimtune.train.guard import Finite, Guard

log = logging.getLogger("slimtune")


class DeltaCallback(TrainerCallback):
    """`Trainer(model=delta.model, callbacks=[DeltaCallback(delta)], ...)`: checks and saves the delta.

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
        self.guard.before_step(step, optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.after_step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.delta.save(folder / "delta")
            log.info("saved %s", folder / "delta")
