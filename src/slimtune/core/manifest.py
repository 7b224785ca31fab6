"""A folder that can be trusted: flat, every file named with its size and SHA-256, sealed, no surprises.

The manifest is one JSON object. `files` names every other file of the folder; `self` is the SHA-256 of
the canonical JSON (sorted keys, no spaces, ASCII) of all the rest, so that a changed field is noticed.
"""
import hashlib
import io
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from slimtune.errors import DeltaError, listing

MAX_JSON = 16 * 2**20
RESTORE = "Nothing was loaded. Restore the folder from a copy, or save it again."
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")
Check = Callable[[dict[str, Any]], None] | None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, read strictly; `where` names the file in errors.

    Errors: DeltaError for text that is not UTF-8, not one JSON object, too large, or with a repeated key,
    NaN or Infinity (which JSON does not have).

    Example:
        >>> parse_json(b'{"a": [1, 2.5]}', "x.json")
        {'a': [1, 2.5]}
    """
    if len(data) > MAX_JSON:
        raise DeltaError(f"{where}: larger than {MAX_JSON >> 20} MB, which no manifest is.", RESTORE)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DeltaError(f"{where}: not valid JSON ({reason[:200]}).", RESTORE) from error
    if not isinstance(value, dict):
        raise DeltaError(f"{where}: holds a JSON {type(value).__name__}, not an object.", RESTORE)
    return value


def plain(value: Any, path: str) -> Any:
    """`value` with tuples as lists, once it is sure to survive JSON unchanged; `path` names it in errors.

    Errors: DeltaError for a key that is not text, a float that is not finite, or any other type.

    Example:
        >>> plain({"rank": 8, "sites": ("attn.q",)}, "info")
        {'rank': 8, 'sites': ['attn.q']}
    """
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise DeltaError(f"{path}: the key {odd[0]!r} is not text: JSON would change it.", "Use text.")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DeltaError(f"{path}: {value} cannot be written as JSON.", "Use null, or text.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DeltaError(f"{path}: a {type(value).__name__} cannot be written as JSON.",
                     "It takes: null, true, false, numbers, text, lists and mappings.")


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one byte string that stands for a JSON object: sorted keys, no spaces, ASCII.

    Example:
        >>> canonical({"b": 1, "a": None})
        b'{"a":null,"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with `self`, the SHA-256 of the canonical JSON of the rest.

    Example:
        >>> seal({"a": 1})["self"][:8]
        '015abd7f'
    """
    rest = {key: value for key, value in manifest.items() if key != "self"}
    return rest | {"self": hashlib.sha256(canonical(rest)).hexdigest()}


def render(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as people read it: the text of its file.

    Example:
        >>> render({"b": 1, "a": 2})
        b'{\\n "a": 2,\\n "b": 1\\n}\\n'
    """
    return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def open_regular(path: Path) -> io.BufferedReader:
    """The file, opened to read; a symlink, folder, pipe or device is refused, never followed or waited for.

    Errors: OSError when it cannot be opened; DeltaError when it is not a regular file.
    """
    extra = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    file = os.fdopen(os.open(path, os.O_RDONLY | extra), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DeltaError(f"{path}: not a regular file.", RESTORE)
    return file


def digest_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as the manifest's `files` holds them."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def read_manifest(folder: Path, *, manifest_name: str = "delta.json",
                  first: Check = None) -> dict[str, Any]:
    """The manifest of a folder, once its seal holds; the other files are not looked at.

    `first` is called with the manifest before its seal is checked, to tell a newer format from a damaged one.
    Errors: DeltaError when it is missing, malformed, or was changed.
    """
    path = folder / manifest_name
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON + 1)
    except OSError as error:
        raise _absent(folder, manifest_name, error) from error
    manifest = parse_json(data, str(path))
    if first is not None:
        first(manifest)
    try:
        sealed = seal(manifest)["self"]
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{path}: holds a value that JSON cannot ({error}).", RESTORE) from error
    if manifest.get("self") != sealed:
        raise DeltaError(f"{path}: a field was changed after it was saved (its SHA-256 differs).", RESTORE)
    _check_files(manifest.get("files"), manifest_name, path)
    return manifest


def verify_folder(folder: Path, *, manifest_name: str = "delta.json") -> dict[str, Any]:
    """The manifest of a folder in which every file is there, nothing else is, and size and SHA-256 agree.

    Errors: DeltaError that names the file and what differs.
    """
    return _steady(folder, lambda: _read(folder, manifest_name, None, keep=False)[0])


def read_folder(folder: Path, *, manifest_name: str = "delta.json", first: Check = None,
                ) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The verified manifest and the very bytes that were verified, each file read once.

    Memory: the size of the folder. Errors: as `verify_folder`.
    """
    return _steady(folder, lambda: _read(folder, manifest_name, first, keep=True))


def _read(folder: Path, manifest_name: str, first: Check, keep: bool,
          ) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = read_manifest(folder, manifest_name=manifest_name, first=first)
    files = manifest["files"]
    try:
        _check_entries(folder, {manifest_name, *files})
        for name, told in files.items():                   # sizes first: a wrong one costs no hashing
            if (size := (folder / name).lstat().st_size) != told["size"]:
                raise DeltaError(f"{folder}: {name} has {size} bytes, its manifest says {told['size']}.",
                                 RESTORE)
        kept = {name: _verified(folder, name, told, keep) for name, told in files.items()}
    except OSError as error:
        raise DeltaError(f"{folder}: could not be read: {error}.", RESTORE) from error
    return manifest, kept


def _verified(folder: Path, name: str, told: Mapping[str, Any], keep: bool) -> bytes:
    data = b""
    if keep:
        with open_regular(folder / name) as file:
            data = file.read(told["size"] + 1)
        found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    else:
        found = digest_file(folder / name)
    if found != told:
        raise DeltaError(f"{folder}: {name} does not match its manifest (SHA-256 differs).",
                         "The file was changed or damaged after it was saved.", RESTORE)
    return data


def _check_entries(folder: Path, known: set[str]) -> None:
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    for name, entry in sorted(found.items()):
        if name not in known:
            pickled = name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
            danger = "It may be a pickle, which can run code when opened; it was not opened."
            raise DeltaError(f"{folder}: holds {name[:80]!r}, which its manifest does not name.",
                             f"It names: {listing(sorted(known))}.",
                             danger if pickled else "", "Move it out of the folder if it is yours.")
        if not entry.is_file(follow_symlinks=False):
            kind = "a symlink" if entry.is_symlink() else "not a regular file"
            raise DeltaError(f"{folder}: {name} is {kind}, which is refused.",
                             "Copy the folder with its contents (cp -rL).")
    if missing := sorted(known - set(found)):
        raise DeltaError(f"{folder}: {missing[0]} is missing.",
                         f"There is: {listing(sorted(found)) or 'nothing'}.", RESTORE)


def _check_files(files: Any, manifest_name: str, path: Path) -> None:
    if not isinstance(files, dict):
        raise DeltaError(f"{path}: has no table of files.", RESTORE)
    for name, told in files.items():
        if not NAME.fullmatch(name) or name == manifest_name:
            raise DeltaError(f"{path}: files: {name[:80]!r} is not a plain file name.",
                             "Such a name could point outside the folder; it was not opened.", RESTORE)
        if not (isinstance(told, dict) and set(told) == {"size", "sha256"} and type(told["size"]) is int
                and isinstance(told["sha256"], str) and _SHA256.fullmatch(told["sha256"])):
            raise DeltaError(f"{path}: files: {name}: not a size and a SHA-256.", RESTORE)


def _steady(folder: Path, read: Callable[[], T]) -> T:
    """Reads again when another process put a new folder in place meanwhile."""
    for _ in range(8):
        before = _identity(folder)
        try:
            return read()
        except DeltaError:
            if before is not None and _identity(folder) == before:
                raise
        time.sleep(0.005)                                   # between two renames it is nowhere for a moment
    return read()


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        info = folder.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns


def _absent(folder: Path, manifest_name: str, error: OSError) -> DeltaError:
    if not folder.exists():
        return DeltaError(f"{folder}: no such folder.", "Check the path.")
    if not folder.is_dir():
        return DeltaError(f"{folder}: a file, not a folder.", f"Give the folder that holds {manifest_name}.")
    if (folder / manifest_name).is_symlink():
        return DeltaError(f"{folder}: {manifest_name} is a symlink, which is refused.",
                          "Copy the folder with its contents (cp -rL).")
    if (folder / manifest_name).exists():
        return DeltaError(f"{folder}: {manifest_name} could not be read: {error.strerror}.", RESTORE)
    there = listing(sorted(entry.name for entry in folder.iterdir()))
    return DeltaError(f"{folder}: {manifest_name} is missing.", f"There is: {there or 'nothing'}.", RESTORE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
