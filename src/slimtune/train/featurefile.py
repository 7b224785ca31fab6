"""The feature cache on disk: one memory-mapped file a state, the examples' rows one behind the other.

    <folder>/
        features.json           sealed manifest: the key, each state's width and dtype, size and SHA-256 of each file
        index.safetensors       <state>: (examples, 2), first row and number of rows
        <state>.bin             (rows, width), in this machine's byte order, without padding

While it is filled it stands in .part-<folder>, whose index says how far it is; a killed run goes on from there.
"""
import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.manifest import canonical, digest_file, read_manifest, render, seal, verify_folder
from slimtune.errors import DataError, DeltaError, TrainError, listing

try:
    import fcntl
except ImportError:                                         # Windows: two runs must not fill one cache there
    fcntl = None

FORMAT, FORMAT_VERSION = "slimtune-features", 1
MANIFEST, INDEX, BEGUN = "features.json", "index.safetensors", "filling.json"
EVERY = 10.0
"""Seconds between saves of how far the filling is."""
States = Mapping[str, tuple[int, torch.dtype]]
"""{state: (width, dtype)}"""


class FeatureFile:
    """A whole cache, opened to read; nothing is copied until an example is asked for.

    Every byte is verified when it is opened: one sequential read, which also brings it into the page cache.
    Errors: DataError for no cache, another key or another state, and for a file that does not verify.
    """

    def __init__(self, folder: Path, key: Mapping[str, str], states: States) -> None:
        from safetensors.torch import load_file

        manifest = _read(folder)
        _same(folder, manifest, key, states)
        try:
            verify_folder(folder, manifest_name=MANIFEST)
        except DeltaError as error:
            raise DataError(f"{folder}: the feature cache is damaged: {str(error).splitlines()[0]}",
                            "Delete it; it is filled again.") from error
        self.index = load_file(folder / INDEX)
        self.maps = {name: _mapped(folder / f"{name}.bin", *states[name]) for name in states}

    def rows(self, state: str, example: int) -> Tensor:
        """One example's state. Shapes: (tokens, width)."""
        start, count = self.index[state][example].tolist()
        return self.maps[state][start:start + count]


class Filling:
    """A cache in the making: `add` each batch once, in one order, then `finish`.

    Errors: TrainError when the disk fails.
    """

    def __init__(self, folder: Path, key: Mapping[str, str], states: States, examples: int) -> None:
        self.folder, self.part, self.states = folder, folder.with_name(f".part-{folder.name}"), states
        self.facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "key": dict(key), "examples": examples,
                      "states": {name: [width, _word(dtype)] for name, (width, dtype) in states.items()}}
        self.index = {name: torch.full((examples, 2), -1, dtype=torch.int64) for name in states}
        self.ends = dict.fromkeys(states, 0)
        self._saved = time.monotonic()

    @contextlib.contextmanager
    def opened(self) -> Iterator["Filling"]:
        """Opens the files as a killed run of the same key left them, and keeps other processes out."""
        with contextlib.ExitStack() as stack:
            with _writing(self.folder):
                self.part.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_only_one(self.part, self.folder))
                self._begin()
                paths = {name: self.part / f"{name}.bin" for name in self.states}
                self.files = {name: stack.enter_context(path.open("ab")) for name, path in paths.items()}
                for name, file in self.files.items():
                    width, dtype = self.states[name]
                    file.truncate(self.ends[name] * width * dtype.itemsize)
            yield self

    def _begin(self) -> None:
        from safetensors.torch import load_file

        begun, index = self.part / BEGUN, self.part / INDEX
        if begun.is_file() and begun.read_bytes() == canonical(self.facts) and index.is_file():
            self.index = load_file(index)
            self.ends = {name: max(int(rows.sum(1).max()), 0) for name, rows in self.index.items()}
            return
        for path in self.part.iterdir():
            path.unlink()
        _replace(begun, canonical(self.facts))

    def has(self, example: int) -> bool:
        """Whether an example is there already."""
        return int(next(iter(self.index.values()))[example, 0]) >= 0

    def add(self, examples: Sequence[int], states: Mapping[str, Tensor]) -> None:
        """Append a batch. Shapes: each state (examples, tokens, width)."""
        with _writing(self.folder):
            for name, state in states.items():
                count = state.shape[1]
                data = state.detach().to("cpu", self.states[name][1]).contiguous()
                self.files[name].write(data.view(torch.uint8).numpy().data)
                starts = self.ends[name] + count * torch.arange(len(examples))
                self.index[name][list(examples)] = torch.stack([starts, torch.full_like(starts, count)], 1)
                self.ends[name] += count * len(examples)
        if time.monotonic() - self._saved >= EVERY:
            self.save()

    def save(self) -> None:
        """Make sure that the disk has what was added, then say so."""
        from safetensors.torch import save

        with _writing(self.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            _replace(self.part / INDEX, save(self.index))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Write the manifest and put the folder in place."""
        self.save()
        with _writing(self.folder):
            table = {name: digest_file(self.part / name) for name in (INDEX, *(f"{s}.bin" for s in self.states))}
            (self.part / BEGUN).unlink()
            _replace(self.part / MANIFEST, render(seal({**self.facts, "files": table})))
            discard(self.folder)
            self.part.rename(self.folder)


def discard(folder: Path) -> None:
    """Delete a cache, damaged or not. Errors: DataError for a folder that holds anything else."""
    if not folder.exists():
        return
    plain = folder.is_dir() and not folder.is_symlink()
    names = [path.name for path in folder.iterdir()] if plain else [folder.name]
    foreign = [name for name in names if name not in (MANIFEST, INDEX) and not name.endswith(".bin")]
    if foreign:
        raise DataError(f"{folder}: not a feature cache; it is not replaced.",
                        f"It holds: {listing(foreign, 8)}", "Move it away, or choose another: train.cache=FOLDER")
    shutil.rmtree(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainError(f"{folder}: the feature cache could not be written: {error.strerror or error}.",
                         "Make room, then run again: it goes on from there. Or choose another disk: "
                         "train.cache=FOLDER") from error


def _read(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(folder, manifest_name=MANIFEST)
    except DeltaError as error:
        raise DataError(f"{folder}: no feature cache, or a damaged one: {str(error).splitlines()[0]}",
                        "Choose another folder, or delete it if it was one; it is filled again.") from error
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{folder}: {MANIFEST} is of format {manifest.get('format')!r} "
                        f"{manifest.get('format_version')!r}; this slimtune reads {FORMAT!r} {FORMAT_VERSION}.",
                        "Choose another folder, or delete it; it is filled again.")
    return manifest


_PARTS = {"base": "another backbone", "config": "another config of the model", "data": "other examples or tokens",
          "precision": "another precision", "torch": "another torch", "transformers": "another transformers"}


def _same(folder: Path, manifest: Mapping[str, Any], key: Mapping[str, str], states: States) -> None:
    told = manifest["key"]
    other = [f"{words} ({told.get(part)!s:.16}, here {key[part]:.16})" for part, words in _PARTS.items()
             if told.get(part) != key[part]]
    for name, (width, dtype) in states.items():
        if (have := manifest["states"].get(name)) != [width, _word(dtype)]:
            other.append(f"its states are {listing(manifest['states'], 30)}; {name} is needed" if have is None else
                         f"{name} is kept as {have}, here it is {[width, _word(dtype)]}")
            break
    if other:
        raise DataError(f"{folder}: the feature cache is of something else: {'; '.join(other)}.",
                        "Choose another folder (train.cache), or delete this one; it is filled again.")


def _mapped(path: Path, width: int, dtype: torch.dtype) -> Tensor:
    numbers = path.stat().st_size // dtype.itemsize
    if not numbers:
        return torch.empty(0, width, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=numbers, dtype=dtype).view(-1, width)


@contextlib.contextmanager
def _only_one(part: Path, folder: Path) -> Iterator[None]:
    """Keeps a second process from filling the same cache."""
    if fcntl is None:
        yield
        return
    handle = os.open(part, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainError(f"{folder}: another process is filling this feature cache.",
                                 "Wait for it, or choose another folder: train.cache=FOLDER") from None
        yield
    finally:
        os.close(handle)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".new-{path.name}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

