"""onnx, onnxscript, onnxruntime and openvino, where they are used."""
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimtune.errors import ExtraError, SlimtuneError


def need(module: str) -> Any:
    """A module of the extra `export`. Errors: ExtraError when it is not installed, SlimtuneError when it is broken.

    Example:
        >>> need("onnxruntime").InferenceSession.__name__
        'InferenceSession'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
            raise ExtraError(package, "export", "Exporting a model, or running what was exported,") from None
        raise SlimtuneError(f"{package} is installed, and {module} cannot be loaded: {error}.",
                            "Install it again with: pip install --force-reinstall 'slimtune[export]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's talk of what is normal."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
