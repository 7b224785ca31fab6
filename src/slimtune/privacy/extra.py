"""Opacus, where it is used."""
import importlib
import warnings
from typing import Any

from slimtune.errors import ExtraError


def opacus(module: str) -> Any:
    """A module of Opacus. Errors: ExtraError when it is not installed.

    Example:
        >>> opacus("optimizers").DPOptimizer.__name__
        'DPOptimizer'
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"opacus.{module}")
    except ImportError as error:
        raise ExtraError(error.name or "opacus", "privacy", "Private training") from None
