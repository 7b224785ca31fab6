"""Tensors in safetensors files: what can be stored, the file itself, and what it holds before anything is allocated.

No pickle is written or opened.
"""
import functools
import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.manifest import MAX_JSON, RESTORE, parse_json
from slimtune.errors import DeltaError, listing

MAX_TENSORS, MAX_NAME = 100_000, 512
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
          "BOOL": torch.bool}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_NAMES = {code: str(dtype).removeprefix("torch.") for code, dtype in _CODES.items()}
_PICKLE = "A pickle can run code when opened; it was not opened."


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file of plain values (see `storable`). Errors: OSError for a disk that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:                        # a full disk arrives as this
        raise OSError(str(error)) from error


def load_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in a file's bytes; `path` names it in errors. Errors: DeltaError."""
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:                              # many kinds, which all mean the same here
        raise DeltaError(f"{path}: malformed ({error}).", RESTORE) from error


def storable(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Plain, dense, contiguous values on the CPU, each with its own memory; copies only where it must.

    Errors: DeltaError for a name or a tensor that cannot be stored.
    """
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


def header(data: bytes, path: Path) -> dict[str, dict[str, Any]]:
    """Dtype and shape of each tensor, from the file's bytes, with bounds before anything is allocated.

    Errors: DeltaError for what is no safetensors file, such as a pickle.
    """
    if data[8:9] != b"{":
        pickled = data[:2] == b"PK" or data[:1] == b"\x80"
        raise DeltaError(f"{path}: not a safetensors file{', but a pickle or zip file' if pickled else ''}.",
                         _PICKLE if pickled else "", RESTORE)
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_JSON):
        raise DeltaError(f"{path}: its header claims {length} bytes; the file has {len(data)}, "
                         f"and the limit is {MAX_JSON >> 20} MB.", RESTORE)
    text = data[8:8 + length]
    check_count(text.count(b'"data_offsets"'), path)
    told = parse_json(text, f"{path}: header")
    told.pop("__metadata__", None)
    table = {}
    for key, entry in told.items():
        _check_name(key, path)
        code = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(code, str) or code not in _NAMES:
            raise DeltaError(f"{path}: tensor {key!r} has no known dtype ({str(code)[:40]}).",
                             f"It takes: {listing(_NAMES)}.", RESTORE)
        table[key] = {"dtype": _NAMES[code], "shape": entry.get("shape")}
    return table


def described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Dtype and shape of each tensor, as `header` finds them in the file.

    Example:
        >>> described({"A": torch.ones(2, 3)})
        {'A': {'dtype': 'float32', 'shape': [2, 3]}}
    """
    return {key: {"dtype": _NAMES[_CODE_OF[tensor.dtype]], "shape": list(tensor.shape)}
            for key, tensor in tensors.items()}


def check_finite(tensors: Mapping[str, Tensor], folder: Path, *remedy: str) -> None:
    """Errors: DeltaError that names the first tensor that holds NaN or Inf."""
    for key, tensor in tensors.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        real = real.float() if real.itemsize == 1 else real
        low, high = torch.aminmax(real)                     # no copy of the tensor; a NaN comes through
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            count = int((~torch.isfinite(real)).sum())
            raise DeltaError(f"{folder}: tensor {key!r} holds NaN or Inf ({count} of {real.numel()} values).",
                             *remedy)


def check_count(count: int, where: Path) -> None:
    """Errors: DeltaError for more tensors than one file may hold."""
    if count > MAX_TENSORS:
        raise DeltaError(f"{where}: {count} tensors; a file has at most {MAX_TENSORS}.",
                         "Join small tensors into one.")


@functools.cache
def slimtune_version() -> str:
    """The version that is installed; "source" where slimtune runs from its sources."""
    try:
        return importlib.metadata.version("slimtune")
    except importlib.metadata.PackageNotFoundError:
        return "source"
