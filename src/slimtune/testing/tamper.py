"""Tools to damage a saved delta folder on purpose, with or without its hashes made right again."""
import hashlib
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from slimtune.core.deltafile import MANIFEST, TENSORS
from slimtune.core.manifest import render, seal


def canary(folder: Path) -> Path:
    """The file beside the folder that a pickle among the faults would make if it were ever opened."""
    return folder.with_name(f"{folder.name}.canary")


def pickled(folder: Path, protocol: int = 2) -> bytes:
    """A pickle that makes the canary file when it is loaded: the call open(path, "w")."""
    call = b"cbuiltins\nopen\n(V" + str(canary(folder)).encode("raw-unicode-escape") + b"\nVw\ntR."
    return (b"\x80" + bytes([protocol]) if protocol else b"") + call


def zipped(folder: Path, path: Path) -> None:
    """A zip archive as `torch.save` makes them, with that pickle inside, at `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickled(folder))
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def resign(folder: Path, *, table: bool = False) -> None:
    """Make sizes, SHA-256 and seal of `delta.json` right again; with `table` the table of tensors too.

    After this only what the content means can tell that the folder was changed.

    Example:
        >>> import tempfile, torch
        >>> from slimtune.core.deltafile import read_delta, write_delta
        >>> with tempfile.TemporaryDirectory() as home:
        ...     folder = Path(home, "delta")
        ...     write_delta(folder, {"A": torch.ones(2)}, {"rank": 2})
        ...     edit_manifest(folder, lambda manifest: manifest.update(rank=3), sealed=False)
        ...     resign(folder)
        ...     read_delta(folder)[0]
        {'rank': 3}
    """
    manifest = manifest_of(folder)
    for name, told in manifest["files"].items():
        data = (folder / name).read_bytes()
        told.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    if table:
        tensors = load((folder / TENSORS).read_bytes())
        manifest["tensors"] = {
            key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for key, value in tensors.items()}
    put_manifest(folder, manifest)


def manifest_of(folder: Path) -> dict[str, Any]:
    """`delta.json`, unchecked."""
    return json.loads((folder / MANIFEST).read_bytes())


def put_manifest(folder: Path, manifest: dict[str, Any], *, sealed: bool = True) -> None:
    """Write `delta.json`, with a right seal or the one it has."""
    (folder / MANIFEST).write_bytes(render(seal(manifest) if sealed else manifest))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    """Change `delta.json` in place."""
    manifest = manifest_of(folder)
    change(manifest)
    put_manifest(folder, manifest, sealed=sealed)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of `delta.safetensors` and the bytes after it."""
    data = (folder / TENSORS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def put_header(folder: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write `delta.safetensors` from any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors in place; hashes are left wrong."""
    tensors = load((folder / TENSORS).read_bytes())
    change(tensors)
    (folder / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))


def pick(tensors: dict[str, Tensor], part: float) -> str:
    """The name of a floating tensor with two or more numbers; `part` in [0, 1) says how far down the list."""
    names = [key for key in sorted(tensors) if tensors[key].is_floating_point() and tensors[key].numel() > 1]
    if not names:
        raise LookupError("the faults need a delta with a floating tensor of two or more numbers.")
    return names[int(part * len(names))]


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths to all values in nested JSON that are neither an object nor a list."""
    if not isinstance(value, dict | list):
        yield path
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, (*path, key))


def change_leaf(value: Any, path: tuple[str | int, ...]) -> None:
    """Put another value of the same type at `path` (true in place of null)."""
    for key in path[:-1]:
        value = value[key]
    old = value[path[-1]]
    if isinstance(old, bool) or old is None:
        value[path[-1]] = not old
    else:
        value[path[-1]] = old + "x" if isinstance(old, str) else old + 1


def rewrite(name: str, change: Callable[[bytes], bytes], folder: Path) -> None:
    """Change the bytes of one file."""
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def flip_bit(path: Path, rng: random.Random) -> None:
    """Flip one bit so that the content is another one: in JSON, '1e-5' and '1E-5' are the same."""
    data = bytearray(path.read_bytes())
    before = _meaning(bytes(data), path)
    while _meaning(bytes(data), path) == before:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _meaning(data: bytes, path: Path) -> Any:
    if path.suffix != ".json":
        return data
    try:
        return json.loads(data)
    except ValueError:
        return data


def outside(folder: Path) -> Path:
    """A copy of the tensors beside the folder, for paths and links that lead out of it."""
    path = folder.with_name(f"{folder.name}.outside")
    path.write_bytes((folder / TENSORS).read_bytes())
    return path


def pipe(path: Path) -> None:
    """A named pipe in place of a file: who opens it naively waits for ever."""
    path.unlink()
    os.mkfifo(path)
