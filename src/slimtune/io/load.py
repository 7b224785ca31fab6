"""load: a delta from a folder of any format that slimtune reads."""
from pathlib import Path

from torch import nn

from slimtune.core.delta import Delta
from slimtune.core.load import load_delta


def load(model: nn.Module, folder: Path | str, name: str | None = None) -> Delta:
    """The delta saved in a folder, attached to the model and active.

    Errors: DeltaError for a folder that does not verify, another base, or tensors that do not fit; the
    model is left as it was.
    Example:
        >>> import tempfile
        >>> from slimtune.core import attach
        >>> from slimtune.methods import IA3
        >>> from slimtune.testing import tiny
        >>> with tempfile.TemporaryDirectory() as home:
        ...     attach(tiny("bert"), IA3(), name="sst2").save(home + "/sst2")
        ...     load(tiny("bert"), home + "/sst2").count().adapter
        256
    """
    return load_delta(model, folder, name)
