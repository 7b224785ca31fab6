"""The delta file: `delta.safetensors` and `delta.json`, verified byte for byte before anything is loaded.

`delta.json` holds whatever the layer above wants to keep (method, anatomy fingerprint, counts, task ...),
a table of the tensors (dtype and shape), the size and SHA-256 of `delta.safetensors`, and its own SHA-256.
No pickle is written or opened. See section 5 of the design.
"""
import functools
import importlib.metadata
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.atomic import recover, write_folder
from slimtune.core.manifest import MAX_JSON, RESTORE, parse_json, read_folder
from slimtune.errors import DeltaError, listing, suggest

FORMAT = "slimtune-delta"
FORMAT_VERSION = 2
"""The newest that is read; 2 is 1 with masks, and is written only where there are some."""
MAX_TENSORS, MAX_NAME = 100_000, 512
MANIFEST, TENSORS = "delta.json", "delta.safetensors"
_OURS = ("files", "format", "format_version", "self", "slimtune", "tensors")
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
          "BOOL": torch.bool}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_NAMES = {code: str(dtype).removeprefix("torch.") for code, dtype in _CODES.items()}
_PICKLE = "A pickle can run code when opened; it was not opened."


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
    if taken := sorted(set(_OURS) & set(info)):
        raise DeltaError(f"{folder}: info: the key {taken[0]!r} is taken by the file itself.", "Rename it.")
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeltaError(f"{folder}: is there already.", "Choose another folder, or pass overwrite=True.")
    _check_count(len(tensors), folder)
    stored = _storable(tensors, folder)
    if not allow_nonfinite:
        _check_finite(stored, folder, "It was not saved. Go back to the last good checkpoint.")
    table = {key: {"dtype": _NAMES[_CODE_OF[tensor.dtype]], "shape": list(tensor.shape)}
             for key, tensor in stored.items()}
    ours = {"format": FORMAT, "format_version": version, "slimtune": _version(), "tensors": table}

    save = functools.partial(_save, stored)
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
    table = _header(files[TENSORS], folder / TENSORS)
    _check_table(table, manifest.get("tensors"), folder)
    loaded = _load(files[TENSORS], folder / TENSORS)
    tensors = {key: loaded[key] for key in sorted(table)}
    if not allow_nonfinite:
        _check_finite(tensors, folder, RESTORE)
    info = {key: value for key, value in manifest.items() if key not in _OURS}
    return info, {key: tensor.to(device) for key, tensor in tensors.items()}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:                        # a full disk arrives as this
        raise OSError(str(error)) from error


def _load(data: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:                              # many kinds, which all mean the same here
        raise DeltaError(f"{path}: malformed ({error}).", RESTORE) from error


def _storable(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Plain, dense, contiguous values on the CPU, each with its own memory; copies only where it must."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        _check_storable(key, tensor, folder)
    for key in sorted(tensors):
        value = tensors[key].detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
        stored[key] = value
    return stored


def _check_storable(key: str, tensor: Tensor, folder: Path) -> None:
    _check_name(key, folder)
    if not isinstance(tensor, Tensor):
        raise DeltaError(f"{folder}: {key} is a {type(tensor).__name__}, not a tensor.", "Put it in info.")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise DeltaError(f"{folder}: {key} has no plain values: it is {kind}.",
                         "Give a dense tensor (to_dense, dequantize).")
    if tensor.dtype not in _CODE_OF:
        raise DeltaError(f"{folder}: {key} has dtype {tensor.dtype}, which cannot be stored.",
                         f"It takes: {listing(_NAMES.values())}.")


def _check_name(key: Any, where: Path) -> None:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_NAME or key == "__metadata__" or not key.isprintable():
        raise DeltaError(f"{where}: {str(key)[:80]!r} cannot be the name of a tensor.",
                         f"Use printable text of at most {MAX_NAME} letters.")


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


def _header(data: bytes, path: Path) -> dict[str, dict[str, Any]]:
    """Dtype and shape of each tensor, from the file itself, with bounds before anything is allocated."""
    if data[8:9] != b"{":
        pickled = data[:2] == b"PK" or data[:1] == b"\x80"
        raise DeltaError(f"{path}: not a safetensors file{', but a pickle or zip file' if pickled else ''}.",
                         _PICKLE if pickled else "", RESTORE)
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_JSON):
        raise DeltaError(f"{path}: its header claims {length} bytes; the file has {len(data)}, "
                         f"and the limit is {MAX_JSON >> 20} MB.", RESTORE)
    text = data[8:8 + length]
    _check_count(text.count(b'"data_offsets"'), path)
    header = parse_json(text, f"{path}: header")
    header.pop("__metadata__", None)
    table = {}
    for key, entry in header.items():
        _check_name(key, path)
        code = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(code, str) or code not in _NAMES:
            raise DeltaError(f"{path}: tensor {key!r} has no known dtype ({str(code)[:40]}).",
                             f"It takes: {listing(_NAMES)}.", RESTORE)
        table[key] = {"dtype": _NAMES[code], "shape": entry.get("shape")}
    return table


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


def _check_finite(tensors: Mapping[str, Tensor], folder: Path, remedy: str) -> None:
    for key, tensor in tensors.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        real = real.float() if real.itemsize == 1 else real
        low, high = torch.aminmax(real)                     # no copy of the tensor; a NaN comes through
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            count = int((~torch.isfinite(real)).sum())
            raise DeltaError(f"{folder}: tensor {key!r} holds NaN or Inf ({count} of {real.numel()} values).",
                             remedy, "Pass allow_nonfinite=True only to look at it.")


def _check_count(count: int, where: Path) -> None:
    if count > MAX_TENSORS:
        raise DeltaError(f"{where}: {count} tensors; a delta has at most {MAX_TENSORS}.",
                         "Join small tensors into one.")


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


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("slimtune")
    except importlib.metadata.PackageNotFoundError:
        return "source"
