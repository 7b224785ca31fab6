"""An AdapterHub folder on disk: read strictly, pickles as plain tensors only; written in one step, without pickle."""
import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.atomic import write_folder
from slimtune.core.deltafile import _check_finite, _header, _load, _save, _storable
from slimtune.core.manifest import open_regular, parse_json
from slimtune.errors import DeltaError, listing
from slimtune.io.peft_folder import CONFIG, MANIFEST, NOTHING

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
_TRAIN = "Train it again, or restore the folder from a copy."


def is_adapterhub(folder: Path | str) -> bool:
    """Whether a folder looks like one of the `adapters` library, as against PEFT's: both have adapter_config.json.

    Example:
        >>> is_adapterhub("no/such/folder")
        False
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return False
    if any((folder / name).is_file() for name in (TENSORS, PICKLE)):
        return True
    try:
        config = parse_json(_bytes(folder, CONFIG), str(folder / CONFIG))
    except DeltaError:
        return False
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def read_adapter(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter, on the CPU, every value finite.

    Errors: DeltaError for a missing or malformed file, a pickle of anything but tensors, NaN or infinite values.
    """
    folder = Path(folder)
    config = parse_json(_bytes(folder, CONFIG), str(folder / CONFIG))
    return config, _tensors(folder, TENSORS, PICKLE)


def read_head(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The config and the tensors of the head beside an adapter, or None."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in (HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE)):
        return None
    config = parse_json(_bytes(folder, HEAD_CONFIG), str(folder / HEAD_CONFIG))
    return config, _tensors(folder, HEAD_TENSORS, HEAD_PICKLE)


def _tensors(folder: Path, safe: str, pickle: str) -> dict[str, Tensor]:
    if (folder / safe).exists() or not (folder / pickle).exists():
        data = _bytes(folder, safe)
        _header(data, folder / safe)
        tensors = _load(data, folder / safe)
    else:
        tensors = _unpickle(_bytes(folder, pickle), folder / pickle)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DeltaError(f"{folder}: {key!r} is {tensor.dtype}, and no tensor of floats.", NOTHING)
    _check_finite(tensors, folder, f"{NOTHING} {_TRAIN}")
    return {key: tensors[key] for key in sorted(tensors)}


def _unpickle(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, by torch's reader of weights alone: it runs no code of the file."""
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, which all mean the same here
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DeltaError(f"{path}: holds more than plain tensors, or is damaged ({reason}).",
                         "No code of it was run.", f"{NOTHING} {_TRAIN}") from error
    plain = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta
        and not t.is_quantized for k, t in found.items())
    if not plain:
        raise DeltaError(f"{path}: is no table of plain tensors by name.", NOTHING)
    return {key: tensor.detach() for key, tensor in found.items()}


def _bytes(folder: Path, name: str) -> bytes:
    try:
        with open_regular(folder / name) as file:
            return file.read()
    except OSError as error:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise DeltaError(f"{folder}: {name} could not be read ({error.strerror or error}).",
                         f"There is: {listing(there, 12) or 'nothing'}.", NOTHING) from error


Part = tuple[Mapping[str, Any], Mapping[str, Tensor]]


def write_adapterhub(folder: Path | str, adapter: Part, head: Part | None, manifest: Mapping[str, Any]) -> None:
    """Write a folder whole or not at all. `slimtune.json` beside the library's files holds their hashes.

    Errors: DeltaError for a folder that holds anything else, a value that is not finite, a disk that fails.
    """
    folder = Path(folder)
    files: dict[str, Any] = {}
    for part, config, tensors in ((adapter, CONFIG, TENSORS), (head, HEAD_CONFIG, HEAD_TENSORS)):
        if part is not None:
            stored = _storable(part[1], folder)
            _check_finite(stored, folder, "It was not saved. Go back to the last good checkpoint.")
            files |= {config: json.dumps(part[0], indent=2, sort_keys=True).encode(),
                      tensors: functools.partial(_save, stored)}
    write_folder(folder, files, manifest, manifest_name=MANIFEST)
