"""The delta file: `delta.safetensors` and `delta.json`, verified byte for byte before anything is loaded.

`delta.json` holds whatever the layer above wants to keep (method, anatomy fingerprint, counts, task ...),
a table of the tensors (dtype and shape), the size and SHA-256 of `delta.safetensors`, and its own SHA-256.
No pickle is written or opened. See section 5 of the design.
"""
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.atomic import recover, write_folder
from slimtune.core.manifest import RESTORE, read_folder
from slimtune.core.tensorfile import (
    check_count,
    check_finite,
    described,
    header,
    load_tensors,
    save_tensors,
    slimtune_version,
    storable,
)
from slimtune.errors import DeltaError, listing, suggest

FORMAT = "slimtune-delta"
FORMAT_VERSION = 2
"""The newest that is read; 2 is 1 with masks, and is written only where there are some."""
MANIFEST, TENSORS = "delta.json", "delta.safetensors"
RESERVED = ("files", "format", "format_version", "self", "slimtune", "tensors")
_LOOK = "Pass allow_nonfinite=True only to look at it."


def write_delta(folder: Path | str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *,
                overwrite: bool = True, allow_nonfinite: bool = False, version: int = 1) -> None:
    """Write tensors and their description as one folder, in one step; on any error nothing has changed.

    Views, shared memory, other devices and gradients are no trouble: plain values are stored. `info` is any
    JSON; its keys may not be files, format, format_version, self, slimtune or tensors.

    Errors: DeltaError for a tensor that cannot be stored or is not finite, info that is not JSON, and a
    folder that holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     write_delta(home + "/sst2", {"A": torch.ones(2, 3)}, {"method": {"rank": 2}})
        ...     info, tensors = read_delta(home + "/sst2")
        >>> info, tensors["A"].shape
        ({'method': {'rank': 2}}, torch.Size([2, 3]))
    """
    folder = Path(folder)
    if taken := sorted(set(RESERVED) & set(info)):
        raise DeltaError(f"{folder}: info: the key {taken[0]!r} is taken by the file itself.", "Rename it.")
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeltaError(f"{folder}: is there already.", "Choose another folder, or pass overwrite=True.")
    check_count(len(tensors), folder)
    stored = storable(tensors, folder)
    if not allow_nonfinite:
        check_finite(stored, folder, "It was not saved. Go back to the last good checkpoint.", _LOOK)
    ours = {"format": FORMAT, "format_version": version, "slimtune": slimtune_version(), "tensors": described(stored)}

    save = functools.partial(save_tensors, stored)
    write_folder(folder, {TENSORS: save}, {**info, **ours}, manifest_name=MANIFEST)


def read_delta(folder: Path | str, *, device: torch.device | str = "cpu",
               allow_nonfinite: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`(info, tensors)` of a delta folder, exactly as written, or an error and nothing.

    The file is read once into memory, and the bytes that were hashed are the bytes that are parsed. A save
    that was killed half-way is finished or undone first (`recover`).

    Memory: twice the size of the file. Errors: DeltaError that names the file, the field or the tensor.
    """
    folder = Path(folder)
    if not folder.exists() and not recover(folder, manifest_name=MANIFEST):
        raise _no_folder(folder)
    check = functools.partial(_check_format, folder)
    manifest, files = read_folder(folder, manifest_name=MANIFEST, first=check)
    if set(files) != {TENSORS}:
        raise DeltaError(f"{folder}: {MANIFEST} names {listing(sorted(files)) or 'no file'}.",
                         f"A delta has {TENSORS} and nothing else; no other file was opened.", RESTORE)
    table = header(files[TENSORS], folder / TENSORS)
    _check_table(table, manifest.get("tensors"), folder)
    loaded = load_tensors(files[TENSORS], folder / TENSORS)
    tensors = {key: loaded[key] for key in sorted(table)}
    if not allow_nonfinite:
        check_finite(tensors, folder, RESTORE, _LOOK)
    info = {key: value for key, value in manifest.items() if key not in RESERVED}
    return info, {key: tensor.to(device) for key, tensor in tensors.items()}


def _check_format(folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise DeltaError(f"{folder}: {MANIFEST} has format {manifest.get('format')!r}, not {FORMAT!r}.",
                         "It was not written by slimtune, or was changed.", RESTORE)
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise DeltaError(f"{folder}: {MANIFEST} has format_version {version!r}, not 1 or more.", RESTORE)
    if version > FORMAT_VERSION:
        raise DeltaError(f"{folder}: format version {version}, written by a newer slimtune "
                         f"({str(manifest.get('slimtune'))[:40]}); this one reads up to {FORMAT_VERSION}.",
                         "Upgrade: pip install -U slimtune")


def _check_table(found: Mapping[str, Any], told: Any, folder: Path) -> None:
    """The file and its manifest must name the same tensors: holds even when every hash was recomputed."""
    if not isinstance(told, dict):
        raise DeltaError(f"{folder}: {MANIFEST} has no table of tensors.", RESTORE)
    missing, extra = sorted(set(told) - set(found)), sorted(set(found) - set(told))
    if missing:
        raise DeltaError(f"{folder}: tensor {missing[0]!r} is missing from {TENSORS}.",
                         f"There is: {listing(sorted(found), 12) or 'none'}.",
                         _renamed(missing[0], extra), RESTORE)
    if extra:
        raise DeltaError(f"{folder}: {TENSORS} holds {extra[0]!r}, which {MANIFEST} does not name.",
                         f"It names: {listing(sorted(told), 12) or 'none'}.", RESTORE)
    for key, entry in found.items():
        if entry != told[key]:
            raise DeltaError(f"{folder}: tensor {key!r} is {_words(entry)} in {TENSORS}, "
                             f"{_words(told[key])} in {MANIFEST}.", RESTORE)


def _no_folder(folder: Path) -> DeltaError:
    near: Iterable[Path] = folder.parent.glob(f"*/{MANIFEST}") if folder.parent.is_dir() else ()
    names = sorted(path.parent.name for path in near)
    return DeltaError(f"{folder}: no such folder.",
                      f"Deltas beside it: {listing(names, 12)}." if names else "Check the path.",
                      suggest(folder.name, names))


def _renamed(missing: str, extra: Iterable[str]) -> str:
    near = suggest(missing, extra)
    return near.replace("Did you mean", "It may have been renamed to") if near else ""


def _words(entry: Any) -> str:
    if isinstance(entry, Mapping) and set(entry) == {"dtype", "shape"}:
        return f"{entry['dtype']} {entry['shape']}"
    return "malformed"
