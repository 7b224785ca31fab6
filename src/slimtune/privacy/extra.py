"""Opacus, where it is used."""
import importlib
import sys
import warnings
from typing import Any

from slimtune.errors import ExtraError, SlimtuneError


def opacus(module: str) -> Any:
    """A module of Opacus. Errors: ExtraError when it is not installed, SlimtuneError when it cannot be loaded.

    Example:
        >>> opacus("optimizers").DPOptimizer.__name__
        'DPOptimizer'
    """
    name = f"opacus.{module}"
    if (loaded := sys.modules.get(name)) is not None:       # each step asks
        return loaded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "opacus":
            raise ExtraError("opacus", "privacy", "Private training") from None
        raise SlimtuneError(f"opacus is installed, and {name} cannot be loaded: {error}.",
                            "Install it again with: pip install --force-reinstall 'slimtune[privacy]'") from error
