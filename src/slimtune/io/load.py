"""load: a delta from a folder of any format that slimtune reads."""
from pathlib import Path

from torch import nn

from slimtune.core.delta import Delta
from slimtune.core.deltafile import MANIFEST
from slimtune.core.labels import Labels
from slimtune.core.load import load_delta
from slimtune.io.adapterhub import is_adapterhub, load_adapterhub
from slimtune.io.peft import is_peft, load_peft


def load(model: nn.Module, folder: Path | str, name: str | None = None, *, labels: Labels = "model") -> Delta:
    """The delta saved in a folder, attached to the model and active: slimtune's own, PEFT's or AdapterHub's.

    labels: "own" takes a delta whose head has another number of labels than the model, such as one of many tasks
    that share a backbone; the model then makes no loss (see route).
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
    if not (Path(folder) / MANIFEST).exists():
        if is_adapterhub(folder):
            return load_adapterhub(model, folder, name, labels)
        if is_peft(folder):
            return load_peft(model, folder, name, labels)
    return load_delta(model, folder, name, labels)
