"""Checkpoints: the delta and all that its training needs, as one folder that is whole or not there.

    checkpoint-<step>/
        checkpoint.json             sealed manifest: hashes, method, base, optimizer's and scheduler's numbers
        delta.safetensors           the delta's tensors; reparametrisations and heads as they are
        optimizer.safetensors       <tensor of the delta>/<state>, such as exp_avg
        rng.safetensors             states of the generators of Python, NumPy and torch
        trainer_state.json          transformers' TrainerState

No pickle is written or read.
"""
import contextlib
import functools
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.core.atomic import read_folder, recover, verify_folder, write_folder
from slimtune.core.manifest import RESTORE
from slimtune.core.tensorfile import save_tensors, slimtune_version
from slimtune.errors import DeltaError, listing

log = logging.getLogger("slimtune")
FORMAT, FORMAT_VERSION = "slimtune-checkpoint", 1
MANIFEST, STATE = "checkpoint.json", "trainer_state.json"
TENSORS = ("delta", "optimizer", "rng")
_NAME = re.compile(r"checkpoint-(\d{1,12})")
_LEFT = re.compile(r"\.(?:tmp|old)-[0-9a-f]{32}-(checkpoint-\d{1,12})")
_GONE = re.compile(r"\.gone-checkpoint-\d{1,12}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: `facts` is its manifest, `state` the text of TrainerState."""

    step: int
    delta: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    facts: dict[str, Any]
    state: str


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write it as `folder`/checkpoint-<step>, in one step, and verify it. Returns its path.

    Errors: DeltaError for a tensor of the delta that is not finite, and for a disk that fails; what was there
    before is unchanged.
    """
    target = folder / f"checkpoint-{checkpoint.step}"
    bad = [name for name, tensor in checkpoint.delta.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise DeltaError(f"{target}: {listing(bad, 8)} holds NaN or infinite values; it was not saved.")
    files: dict[str, Any] = {f"{part}.safetensors": functools.partial(_save, getattr(checkpoint, part))
                             for part in TENSORS}
    files[STATE] = checkpoint.state.encode()
    facts = {**checkpoint.facts, "format": FORMAT, "format_version": FORMAT_VERSION, "step": checkpoint.step,
             "slimtune": slimtune_version()}
    if target.is_dir() and not _verifies(target):
        set_aside(target)
    write_folder(target, files, facts, manifest_name=MANIFEST)
    verify_folder(target, manifest_name=MANIFEST)
    return target


def read_checkpoint(path: Path | str) -> Checkpoint:
    """A checkpoint, from the very bytes that were verified.

    Errors: DeltaError that names the file and what is wrong with it.
    """
    from safetensors.torch import load

    path = Path(path)
    facts, files = read_folder(path, manifest_name=MANIFEST, first=functools.partial(_check_format, path))
    wanted = {STATE, *(f"{part}.safetensors" for part in TENSORS)}
    if set(files) != wanted:
        raise DeltaError(f"{path}: {MANIFEST} names {listing(sorted(files)) or 'no file'}.",
                         f"A checkpoint has {listing(sorted(wanted))}.", RESTORE)
    try:
        parts = {part: load(files[f"{part}.safetensors"]) for part in TENSORS}
        return Checkpoint(int(facts["step"]), **parts, facts=facts, state=files[STATE].decode())
    except Exception as error:                              # many kinds, which all mean the same here
        raise DeltaError(f"{path}: malformed ({error}).", RESTORE) from error


def last_checkpoint(folder: Path | str) -> Path | None:
    """The newest checkpoint of a folder that verifies, or None.

    What a killed save left is finished or undone first. One that does not verify is passed over, with a
    warning that names it.

    Example:
        >>> last_checkpoint("no/such/folder") is None
        True
    """
    folder = Path(folder)
    tidy(folder)
    for path in checkpoints(folder):
        try:
            _check_format(path, verify_folder(path, manifest_name=MANIFEST))
        except DeltaError as error:
            log.warning("checkpoint passed over, because it does not verify: %s", error.what)
        else:
            return path
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folders named checkpoint-<step>, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise DeltaError(f"{path}: not named checkpoint-<step>.")
    return int(match[1])


def tidy(folder: Path) -> None:
    """Finish or undo what killed saves and deletions left; on a disk that cannot be written, a warning."""
    if not folder.is_dir():
        return
    names = [path.name for path in folder.iterdir()]
    for target in sorted({match[1] for name in names if (match := _LEFT.fullmatch(name))}):
        try:
            recover(folder / target, manifest_name=MANIFEST)
        except DeltaError as error:
            log.warning("%s", error.what)
    for name in names:
        if _GONE.fullmatch(name):
            shutil.rmtree(folder / name, ignore_errors=True)


def prune(newest: Path, keep: int, spare: Path | None = None) -> None:
    """Delete the older checkpoints beside one that was just saved, but for `keep` and the one to spare."""
    older = [path for path in checkpoints(newest.parent) if step_of(path) < step_of(newest)]
    for path in older[keep - 1:]:
        if spare is None or path.name != spare.name:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint: it is renamed first, so that half of one is never seen. A failure is a warning."""
    gone = path.with_name(f".gone-{path.name}")
    try:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(gone)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("%s: an old checkpoint could not be deleted: %s", path, error)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that does not verify, so that its step can be saved again."""
    target = path.with_name(f"broken-{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"broken-{path.name}-{number}")
    path.rename(target)
    log.warning("%s does not verify; renamed to %s", path, target.name)
    return target


def _verifies(path: Path) -> bool:
    try:
        verify_folder(path, manifest_name=MANIFEST)
    except DeltaError:
        return False
    return True


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise DeltaError(f"{path}: {MANIFEST} has format {manifest.get('format')!r}, not {FORMAT!r}.", RESTORE)
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise DeltaError(f"{path}: format version {version!r}; this slimtune reads up to {FORMAT_VERSION}.",
                         f"It was written by slimtune {str(manifest.get('slimtune'))[:40]}.")
    if type(manifest.get("step")) is not int or path.name != f"checkpoint-{manifest['step']}":
        raise DeltaError(f"{path}: holds step {manifest.get('step')!r}, which is not its name's.", RESTORE)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
