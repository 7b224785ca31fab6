"""What a run changes around it, and gives back: threads, generators, the model's mode, config and attributes."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from slimtune.core.delta import Delta
from slimtune.core.modes import kept_modes
from slimtune.errors import RecipeError
from slimtune.train.spec import TrainSpec
from slimtune.train.state import kept_rng


@contextmanager
def surroundings(delta: Delta, spec: TrainSpec) -> Iterator[None]:
    """Set threads and gradient checkpointing for a run; afterwards all is as it was, and no gradient is left."""
    model: Any = delta.model
    config = getattr(model, "config", None)
    names = set(vars(model))
    with ExitStack() as stack:
        stack.enter_context(kept_rng())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if config is not None and hasattr(config, "use_cache"):     # Trainer turns it off
            stack.callback(setattr, config, "use_cache", config.use_cache)
        stack.callback(lambda: [delattr(model, name) for name in set(vars(model)) - names])
        stack.enter_context(kept_modes(model))
        stack.callback(lambda: [setattr(p, "grad", None) for p in delta.parameters()])
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        if spec.gradient_checkpointing:
            _checkpointing(model, stack)
        yield


def _checkpointing(model: Any, stack: ExitStack) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return                                              # the caller's, as it is
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"    # before 5.24
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(f"train.gradient_checkpointing: {type(model).__name__} does not support it.",
                          "Set it to false.")
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    stack.callback(getattr(model, f"{word}_checkpointing_disable"))
    if hasattr(model, "_require_grads_hooks"):
        stack.callback(model.disable_input_require_grads)
