"""An AdapterHub folder on disk: an adapter, and a head beside it; pickles are read as plain tensors only."""
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.manifest import parse_json
from slimtune.errors import DeltaError
from slimtune.io.delta_folder import AGAIN, CONFIG, NOTHING, read_bytes, read_tensors, write_parts

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"


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
        config = parse_json(read_bytes(folder, CONFIG), str(folder / CONFIG))
    except DeltaError:
        return False
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def read_adapter(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter, on the CPU, every value finite.

    Errors: DeltaError for a missing or malformed file, a pickle of anything but tensors, NaN or infinite values.
    """
    folder = Path(folder)
    config = parse_json(read_bytes(folder, CONFIG), str(folder / CONFIG))
    return config, _tensors(folder, TENSORS, PICKLE)


def read_head(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The config and the tensors of the head beside an adapter, or None."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in (HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE)):
        return None
    config = parse_json(read_bytes(folder, HEAD_CONFIG), str(folder / HEAD_CONFIG))
    return config, _tensors(folder, HEAD_TENSORS, HEAD_PICKLE)


def _tensors(folder: Path, safe: str, pickle: str) -> dict[str, Tensor]:
    if (folder / safe).exists() or not (folder / pickle).exists():
        return read_tensors(folder, safe)
    return read_tensors(folder, pickle, _unpickle)


def _unpickle(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, by torch's reader of weights alone: it runs no code of the file."""
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, which all mean the same here
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DeltaError(f"{path}: holds more than plain tensors, or is damaged ({reason}).",
                         "No code of it was run.", f"{NOTHING} {AGAIN}") from error
    plain = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta
        and not t.is_quantized for k, t in found.items())
    if not plain:
        raise DeltaError(f"{path}: is no table of plain tensors by name.", NOTHING)
    return {key: tensor.detach() for key, tensor in found.items()}


Part = tuple[Mapping[str, Any], Mapping[str, Tensor]]


def write_adapterhub(folder: Path | str, adapter: Part, head: Part | None, manifest: Mapping[str, Any]) -> None:
    """Write a folder whole or not at all. `slimtune.json` beside the library's files holds their hashes.

    Errors: DeltaError for a folder that holds anything else, a value that is not finite, a disk that fails.
    """
    parts = {CONFIG: adapter[0], TENSORS: adapter[1]}
    if head is not None:
        parts |= {HEAD_CONFIG: head[0], HEAD_TENSORS: head[1]}
    write_parts(folder, parts, manifest)
