"""Load a PEFT folder onto a model as one of our deltas: every field read or refused, every tensor used."""
import warnings
from pathlib import Path

from torch import Tensor, nn

from slimtune.core.anatomy import dissect
from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD, Root
from slimtune.core.labels import Labels
from slimtune.core.unfreeze import base_parameters
from slimtune.errors import DeltaError, SlimtuneError, listing
from slimtune.io.delta_folder import NOTHING
from slimtune.io.peft_config import read_config
from slimtune.io.peft_folder import read_peft
from slimtune.io.peft_names import Modules
from slimtune.io.peft_prompts import read_prefix, read_prompt
from slimtune.io.peft_weights import READERS, Found, Source, norm_method

_READERS = {**READERS, "PROMPT_TUNING": read_prompt, "PREFIX_TUNING": read_prefix}


def load_peft(model: nn.Module, folder: Path | str, name: str | None = None, labels: Labels = "model") -> Delta:
    """The delta of a PEFT folder (LoRA, IA3, LN, prefix and prompt tuning), attached and active.

    Module names of transformers 4 are renamed by transformers' own conversion mapping. A fused projection
    becomes one LoRA a slice. The head comes along where PEFT saved it (`modules_to_save`).

    Errors: DeltaError for a malformed folder, a type or field that is not supported, a tensor that is missing, left
    over, of another shape or not finite; the model is left as it was.
    Example:
        >>> from slimtune.testing import tiny
        >>> load_peft(tiny("bert"), "no/such/folder")
        Traceback (most recent call last):
        slimtune.errors.DeltaError: no/such/folder: adapter_config.json could not be read (No such file or directory).
          There is: nothing.
          Nothing was loaded.
    """
    config, tensors = read_peft(folder)
    root = model._modules.get(CHILD)
    anatomy = (root.anatomy if isinstance(root, Root) else None) or dissect(model)
    kind, fields = read_config(config, str(folder))
    source = Source(str(folder), config, tensors, Modules(model, anatomy))
    found = _READERS[kind](source, fields)
    norm_method(source, found)
    kept = _head(source, found, root)
    if not found.methods:
        raise DeltaError(f"{folder}: holds no tensor of a {kind} adapter.", NOTHING)
    try:
        delta = attach(model, found.methods, name or "default", anatomy=anatomy, state=found.state, labels=labels)
    except SlimtuneError as error:
        raise DeltaError(f"{folder}: {error.what}", *error.more) from None
    delta.info = {"peft": {k: v for k in ("peft_type", "peft_version", "task_type", "base_model_name_or_path")
                           if isinstance(v := config.get(k), str)}}
    if kept:
        warnings.warn(f"{folder} does not hold all of the head; the model's own was kept for: {listing(kept, 6)}",
                      stacklevel=2)
    return delta


def _head(source: Source, found: Found, root: nn.Module | None) -> list[str]:
    """Give the head's tensors to the first method; returns those that the folder leaves to the model."""
    model, heads = source.modules.model, source.modules.anatomy.heads
    swapped = {id(o.value): o.base for d in (root.deltas.values() if isinstance(root, Root) else ()) for o in d.owned}
    own: dict[str, Tensor] = {path: swapped.get(id(p), p).detach() for path, p in base_parameters(model).items()
                              if any(path.startswith(f"{head}.") for head in heads)}
    given = {path: found.plain.pop(path) for path in own if path in found.plain}
    if found.plain:
        raise DeltaError(f"{source.where}: {next(iter(found.plain))!r} belongs to nothing that slimtune reads.",
                         f"It reads the adapter's own tensors, norms and the head ({listing(heads) or 'none here'}).",
                         NOTHING)
    if not given:
        return []
    found.state |= {f"head.{path}": given.get(path, value) for path, value in own.items()}
    found.methods[:1] = [m.model_copy(update={"head": "train"}) for m in found.methods[:1]]
    return [path for path in own if path not in given]
