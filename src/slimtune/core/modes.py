"""Modes: train and eval mode for the length of a `with`, afterwards as each module had it."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Whatever the body sets, every module is afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module has its own again.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1).eval(), nn.Dropout())
        >>> with evaluating(model):
        ...     model[1].training
        False
        >>> model[0].training, model[1].training
        (False, True)
    """
    with kept_modes(model):
        model.eval()
        yield
