"""A PEFT folder on disk: `adapter_config.json` and `adapter_model.safetensors`; a pickle is never opened."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimtune.core.manifest import parse_json
from slimtune.errors import DeltaError
from slimtune.io.delta_folder import CONFIG, NOTHING, read_bytes, read_tensors, write_parts

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
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
    config = parse_json(read_bytes(folder, CONFIG), str(folder / CONFIG))
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise DeltaError(f"{folder}: holds {PICKLE}, a pickle, and no {TENSORS}.", _CONVERT, NOTHING)
    return config, read_tensors(folder, TENSORS)


def write_peft(folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
               manifest: Mapping[str, Any]) -> None:
    """Write a PEFT folder whole or not at all. `slimtune.json` beside PEFT's two files holds their hashes.

    Errors: DeltaError for a folder that holds anything else, a value that is not finite, a disk that fails.
    """
    write_parts(folder, {CONFIG: config, TENSORS: tensors}, manifest)


def base_name(model: nn.Module) -> str | None:
    """What `base_model_name_or_path` says: where the model was loaded from, if it knows."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
