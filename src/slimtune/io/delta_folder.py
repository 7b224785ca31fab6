"""Another library's folder on disk, PEFT's or AdapterHub's: read strictly, written in one step, without pickle."""
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.core.atomic import write_folder
from slimtune.core.manifest import open_regular
from slimtune.core.tensorfile import check_finite, header, load_tensors, save_tensors, storable
from slimtune.errors import DeltaError, listing

CONFIG, MANIFEST = "adapter_config.json", "slimtune.json"
NOTHING = "Nothing was loaded."
AGAIN = "Train it again, or restore the folder from a copy."


def read_bytes(folder: Path, name: str) -> bytes:
    """A regular file of the folder. Errors: DeltaError saying what there is, and the folders inside to choose from."""
    try:
        with open_regular(folder / name) as file:
            return file.read()
    except OSError as error:
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        more = f"Folders inside it with {CONFIG}: {listing(inner, 12)}. Name one of them." if inner else NOTHING
        raise DeltaError(f"{folder}: {name} could not be read ({error.strerror or error}).",
                         f"There is: {listing(there, 12) or 'nothing'}.", more) from error


def safe(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes. Errors: DeltaError."""
    header(data, path)
    return load_tensors(data, path)


Parse = Callable[[bytes, Path], dict[str, Tensor]]


def read_tensors(folder: Path, name: str, parse: Parse = safe) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU. Errors: DeltaError for what is no tensor of finite floats."""
    tensors = parse(read_bytes(folder, name), folder / name)
    if odd := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise DeltaError(f"{folder}: {odd[0]!r} is {tensors[odd[0]].dtype}, and no tensor of floats.", NOTHING)
    check_finite(tensors, folder, f"{NOTHING} {AGAIN}")
    return {key: tensors[key] for key in sorted(tensors)}


def write_parts(folder: Path | str, parts: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]) -> None:
    """Write a folder whole or not at all: .safetensors of tensors, .json of a config, and a manifest of their hashes.

    Errors: DeltaError for a folder that holds anything else, a value that is not finite, a disk that fails.
    """
    folder = Path(folder)
    files: dict[str, Any] = {}
    for name, part in parts.items():
        if name.endswith(".safetensors"):
            stored = storable(part, folder)
            check_finite(stored, folder, "It was not saved. Go back to the last good checkpoint.")
            files[name] = functools.partial(save_tensors, stored)
        else:
            files[name] = json.dumps(part, indent=2, sort_keys=True).encode()
    write_folder(folder, files, manifest, manifest_name=MANIFEST)
