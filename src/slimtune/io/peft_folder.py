"""A PEFT folder on disk: `adapter_config.json` and `adapter_model.safetensors`, read strictly, written in one step."""
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimtune.core.atomic import write_folder
from slimtune.core.deltafile import _check_finite, _header, _load, _save, _storable
from slimtune.core.manifest import open_regular, parse_json
from slimtune.errors import DeltaError, listing

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MANIFEST = "slimtune.json"
NOTHING = "Nothing was loaded."
_CONVERT = ("A pickle can run code when it is opened, so it was not. In an environment you trust, load it with peft, "
            "call save_pretrained(folder, safe_serialization=True), and load that folder.")


def is_peft(folder: Path | str) -> bool:
    """Whether a folder looks like PEFT's.

    Example:
        >>> is_peft("no/such/folder")
        False
    """
    return (Path(folder) / CONFIG).is_file()


def read_peft(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a PEFT folder, on the CPU, every value finite.

    Errors: DeltaError for a missing or malformed file, a pickle, NaN or infinite values.
    """
    folder = Path(folder)
    config = parse_json(_bytes(folder, CONFIG), str(folder / CONFIG))
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise DeltaError(f"{folder}: holds {PICKLE}, a pickle, and no {TENSORS}.", _CONVERT, NOTHING)
    data = _bytes(folder, TENSORS)
    _header(data, folder / TENSORS)
    tensors = _load(data, folder / TENSORS)
    if odd := [key for key, t in tensors.items() if not t.is_floating_point()]:
        raise DeltaError(f"{folder}: {odd[0]!r} is {tensors[odd[0]].dtype}, and no tensor of floats.", NOTHING)
    _check_finite(tensors, folder, f"{NOTHING} Train it again, or restore the folder from a copy.")
    return config, {key: tensors[key] for key in sorted(tensors)}


def _bytes(folder: Path, name: str) -> bytes:
    try:
        with open_regular(folder / name) as file:
            return file.read()
    except OSError as error:
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        more = f"PEFT folders inside it: {listing(inner, 12)}. Name one of them." if inner else NOTHING
        raise DeltaError(f"{folder}: {name} could not be read ({error.strerror or error}).",
                         f"There is: {listing(there, 12) or 'nothing'}.", more) from error


def write_peft(folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
               manifest: Mapping[str, Any]) -> None:
    """Write a PEFT folder whole or not at all. `slimtune.json` beside PEFT's two files holds their hashes.

    Errors: DeltaError for a folder that holds anything else, a value that is not finite, a disk that fails.
    """
    folder = Path(folder)
    stored = _storable(tensors, folder)
    _check_finite(stored, folder, "It was not saved. Go back to the last good checkpoint.")
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    write_folder(folder, {CONFIG: text, TENSORS: functools.partial(_save, stored)}, manifest, manifest_name=MANIFEST)


def base_name(model: nn.Module) -> str | None:
    """What `base_model_name_or_path` says: where the model was loaded from, if it knows."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
