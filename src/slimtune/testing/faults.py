"""Hundreds of ways in which a delta folder can be damaged or forged, each of which must be refused.

    for fault in delta_faults():
        shutil.copytree(good, folder)
        fault.apply(folder)
        with pytest.raises(DeltaError):
            st.load(model, folder)

`caught_by` says who can tell: "file" faults break the file itself and `read_delta` refuses them; "delta"
faults are well-formed files with right hashes that fit no method or another backbone: `load` refuses them.
"""
import functools
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimtune.core.deltafile import MANIFEST, TENSORS
from slimtune.testing import forgeries, tamper
from slimtune.testing.tamper import canary, resign

__all__ = ["Fault", "canary", "delta_faults", "resign"]
Edit = Callable[[Path], Any]
FLIPS, FIELDS = 64, 24


@dataclass(frozen=True)
class Fault:
    """One way to damage a saved delta: `apply(folder)` changes it in place.

    It may make files beside the folder, whose names begin with the folder's: put it in a folder of its own.
    """

    name: str
    apply: Edit
    caught_by: Literal["file", "delta"]


def delta_faults(seed: int = 0) -> Iterator[Fault]:
    """All faults, more than 200, the same ones for the same seed and folder.

    The folder must hold a floating tensor with two or more numbers, and the "delta" faults need what
    `Delta.save` writes in `delta.json`: "base", its fingerprint, and "methods", a list of configs.

    Example:
        >>> faults = list(delta_faults())
        >>> len(faults) > 200, faults[0].name, faults[0].caught_by
        (True, 'bit flip 0 in delta.safetensors', 'file')
    """
    groups = (_flips(seed), _cuts(seed), _files(), _fields(seed), forgeries.manifests(), forgeries.headers(),
              forgeries.tensors())
    for group in groups:
        for name, edit in group:
            yield Fault(name, edit, "file")
    for name, edit in forgeries.strangers():
        yield Fault(name, edit, "delta")


def _flips(seed: int) -> Iterator[tuple[str, Edit]]:
    for name in (TENSORS, MANIFEST):
        for i in range(FLIPS):
            yield f"bit flip {i} in {name}", functools.partial(_flip, name, f"{seed} {name} {i}")


def _flip(name: str, seed: str, folder: Path) -> None:
    tamper.flip_bit(folder / name, random.Random(seed))


def _cuts(seed: int) -> Iterator[tuple[str, Edit]]:
    for name in (TENSORS, MANIFEST):
        for part in range(16):
            change = functools.partial(_cut, part)
            yield f"{name} cut at {part}/16", functools.partial(tamper.rewrite, name, change)
        yield f"{name} without its end", functools.partial(tamper.rewrite, name, lambda data: data[:-2])
        yield f"{name} with a byte more", functools.partial(tamper.rewrite, name, lambda data: data + b"}")
        yield f"{name} twice", functools.partial(tamper.rewrite, name, lambda data: data + data)
        yield f"{name} all zeros", functools.partial(tamper.rewrite, name, lambda data: bytes(len(data)))
    for i in range(4):
        change = functools.partial(_hole, f"{seed} {i}")
        yield f"hole {i} in {TENSORS}", functools.partial(tamper.rewrite, TENSORS, change)


def _cut(part: int, data: bytes) -> bytes:
    return data[:len(data) * part // 16]


def _hole(seed: str, data: bytes) -> bytes:
    """Inverted bytes, as long as a sixteenth of the file."""
    start, size = random.Random(seed).randrange(len(data) * 15 // 16), max(1, len(data) // 16)
    return data[:start] + bytes(255 - byte for byte in data[start:start + size]) + data[start + size:]


def _files() -> Iterator[tuple[str, Edit]]:
    for name in (TENSORS, MANIFEST):
        for what, edit in _IN_PLACE.items():
            yield f"{name} {what}", functools.partial(edit, name)
    for name in ("delta.bin", "delta.pt", "pytorch_model.bin", "other.safetensors", ".hidden", "DELTA.JSON"):
        yield f"extra file {name}", functools.partial(_pickle, 2, name)
    yield "extra folder", lambda folder: (folder / "__pycache__").mkdir()
    yield "extra symlink", lambda folder: (folder / "link").symlink_to(tamper.outside(folder))
    yield "all files missing", lambda folder: [path.unlink() for path in folder.iterdir()]
    yield "no folder", shutil.rmtree
    yield "a file in place of the folder", lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x"))
    yield "the two files exchanged", _exchange


_IN_PLACE: dict[str, Callable[[str, Path], Any]] = {
    "missing": lambda name, folder: (folder / name).unlink(),
    "renamed": lambda name, folder: (folder / name).rename(folder / f"model.{name}"),
    "a folder": lambda name, folder: _as_folder(folder / name),
    "a symlink": lambda name, folder: _as_link(name, folder),
    "a dead symlink": lambda name, folder: _as_dead_link(folder / name),
    "a named pipe": lambda name, folder: tamper.pipe(folder / name),
    "a pickle": lambda name, folder: _pickle(2, name, folder),
    "an old pickle": lambda name, folder: _pickle(0, name, folder),
    "a zip of pickles": lambda name, folder: tamper.zipped(folder, folder / name),
}


def _pickle(protocol: int, name: str, folder: Path) -> None:
    (folder / name).write_bytes(tamper.pickled(folder, protocol))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_link(name: str, folder: Path) -> None:
    """The same bytes, but elsewhere: refused although they would verify."""
    away = folder.with_name(f"{folder.name}.{name}")
    (folder / name).rename(away)
    (folder / name).symlink_to(away)


def _as_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _exchange(folder: Path) -> None:
    (folder / MANIFEST).rename(folder / "x")
    (folder / TENSORS).rename(folder / MANIFEST)
    (folder / "x").rename(folder / TENSORS)


def _fields(seed: int) -> Iterator[tuple[str, Edit]]:
    """A field of the description changed by hand: hashes of files still hold, the seal does not."""
    for i in range(FIELDS):
        yield f"field {i} changed", functools.partial(_change_field, f"{seed} field {i}")
    for name, change in _UNSEALED.items():
        yield name, functools.partial(tamper.edit_manifest, change=change, sealed=False)


_UNSEALED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "field added": lambda manifest: manifest.update(extra=1),
    "field removed": lambda manifest: manifest.pop("slimtune"),
    "seal removed": lambda manifest: manifest.pop("self"),
    "seal null": lambda manifest: manifest.update(self=None),
}


def _change_field(seed: str, folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        paths = [path for path in tamper.leaves(manifest) if path[0] not in ("self", "files")]
        tamper.change_leaf(manifest, random.Random(seed).choice(paths))

    tamper.edit_manifest(folder, change, sealed=False)
