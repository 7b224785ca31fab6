"""Folders that appear whole or not at all: for delta files and for training checkpoints.

Everything is written and fsynced in a hidden folder beside the target, the manifest last; then the old
folder is renamed aside, the new one renamed in, the parent fsynced and the old one deleted. Whatever
moment the process is killed at, `recover` finds a folder that verifies, the old or the new.

    .tmp-<uuid>-<name>   being written, or complete and not yet in place
    .old-<uuid>-<name>   the folder that was there before, until the new one is in place
"""
import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtune.core.manifest import (
    NAME,
    digest_file,
    plain,
    read_folder,
    read_manifest,
    render,
    seal,
    verify_folder,
)
from slimtune.errors import DeltaError, listing

try:
    import fcntl
except ImportError:                                         # Windows: no flock; writers must not race there
    fcntl = None

__all__ = ["read_folder", "read_manifest", "recover", "refuse_foreign", "verify_folder", "write_folder"]
Content = bytes | Callable[[Path], None]
_LEFT = re.compile(r"\.(tmp|old)-[0-9a-f]{32}-(.+)", re.DOTALL)
_PATIENCE = 60.0                                            # seconds to wait for another writer


def write_folder(target: Path, files: Mapping[str, Content], manifest: Mapping[str, Any], *,
                 manifest_name: str = "delta.json") -> None:
    """Write a flat folder in one step: afterwards `target` is the new folder, or on any error the old one.

    A file is bytes, or a function that writes the file whose path it is given. The manifest gains `files`
    and `self` (see `slimtune.core.manifest`). A folder that is there already is replaced only if it is empty
    or was written by this function; two processes may write the same target, and the last one stays.

    Errors: DeltaError for a target that holds anything else, a bad name, a manifest that is not JSON, and
    for a disk that is full, failing or read-only (the OSError is its `__cause__`).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     write_folder(Path(home) / "delta", {"a.txt": b"hello"}, {"step": 3})
        ...     verify_folder(Path(home) / "delta")["step"]
        3
    """
    target = _target(target)
    body = _checked(files, manifest, manifest_name, target)
    tmp = _sibling(target, "tmp")
    held = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            _recover(target, manifest_name)
            refuse_foreign(target, manifest_name)
            tmp.mkdir()
            held = _lock(tmp)                               # tells `recover` that its writer lives
        _fill(tmp, files, body, manifest_name)
        with _locked(target.parent):
            refuse_foreign(target, manifest_name)
            _swap(tmp, target)
    except OSError as error:
        raise DeltaError(f"{target}: could not be written: {error.strerror or error}.",
                         "What was there before is unchanged.",
                         "Make room or choose another disk, then save again.") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        _unlock(held)


def recover(target: Path, *, manifest_name: str = "delta.json") -> bool:
    """Finish or undo what a killed `write_folder` left behind; True if `target` is there afterwards.

    A missing or empty target is brought back from a complete sibling. Partly written siblings are deleted, others
    once the target verifies. A sibling that a living process is writing is left alone.

    Example:
        >>> recover(Path("no/such/delta"))
        False
    """
    target = _target(target)
    if not target.parent.is_dir():
        return False
    try:
        if _leftovers(target):
            with _locked(target.parent):
                _recover(target, manifest_name)
    except OSError as error:
        raise DeltaError(f"{target}: what a killed save left could not be tidied: {error.strerror or error}.",
                         f"Beside it are: {listing(path.name for path in _leftovers(target))}.",
                         "Make the parent folder writable, then try again.") from error
    return os.path.lexists(target)


def _recover(target: Path, manifest_name: str) -> None:
    left = [path for path in _leftovers(target) if not _alive(path)]
    vacant = not os.path.lexists(target) or _is_empty(target)
    if vacant and (whole := next((path for path in left if _verifies(path, manifest_name)), None)):
        if target.exists():
            target.rmdir()
        whole.rename(target)
        _fsync_folder(target.parent)
        left.remove(whole)
    if not left:
        return
    safe = _verifies(target, manifest_name)
    for path in left:
        if safe or (path.name.startswith(".tmp-") and not _verifies(path, manifest_name)):
            shutil.rmtree(path)


def _leftovers(target: Path) -> list[Path]:
    """Siblings that belong to the target: new ones before old ones, the youngest first."""
    found = [path for path in target.parent.iterdir()
             if (match := _LEFT.fullmatch(path.name)) and match[2] == target.name]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (path.name[:5] == ".tmp-", path.stat().st_mtime_ns), reverse=True)


def _fill(tmp: Path, files: Mapping[str, Content], body: Mapping[str, Any], manifest_name: str) -> None:
    table = {name: _write(tmp / name, content) for name, content in files.items()}
    _write(tmp / manifest_name, render(seal({**body, "files": table})))
    if extra := sorted({path.name for path in tmp.iterdir()} - {manifest_name, *files}):
        raise DeltaError(f"{tmp}: a writer made {extra[0]!r} beside its own file.",
                         f"Name every file of the folder; named were: {listing(files)}.")
    _fsync_folder(tmp)


def _write(path: Path, content: Content) -> dict[str, Any]:
    """Writes and fsyncs one file, and reads back what the disk holds."""
    if callable(content):
        content(path)
        with path.open("rb+") as file:
            if hasattr(os, "fchmod"):                       # safetensors lets only the owner read
                os.fchmod(file.fileno(), path.parent.stat().st_mode & 0o666)
            os.fsync(file.fileno())
        return digest_file(path)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    found = digest_file(path)
    if found != {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}:
        raise OSError(errno.EIO, f"the disk did not keep what was written to {path.name}")
    return found


def _swap(tmp: Path, target: Path) -> None:
    old = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        tmp.rename(target)
        _fsync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):                  # back to what was; or else `recover` does it
            if not tmp.exists():
                target.rename(tmp)
            if old.exists():
                old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)                  # the save is done; `recover` tidies what stays


def refuse_foreign(target: Path, manifest_name: str) -> None:
    """Deletes nobody's data: only an empty folder or one that we wrote may be replaced. Errors: DeltaError."""
    other = "Choose another folder, or move that one away first."
    if target.is_symlink():
        raise DeltaError(f"{target}: a symlink, which is not replaced.", f"It points to {target.readlink()}.",
                         other)
    if not target.exists():
        return
    if not target.is_dir():
        raise DeltaError(f"{target}: a file, not a folder.", other)
    with os.scandir(target) as entries:
        found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    if not found:
        return
    try:
        known = {manifest_name, *read_manifest(target, manifest_name=manifest_name)["files"]}
    except DeltaError as error:
        raise DeltaError(f"{target}: not a folder of slimtune, or one that was changed; it is not replaced.",
                         f"It holds: {listing(sorted(found), 8)}.", error.what, other) from error
    if foreign := sorted(name for name, is_folder in found.items() if is_folder or name not in known):
        raise DeltaError(f"{target}: holds {foreign[0]!r}, which slimtune did not write; it is not replaced.",
                         other)


def _checked(files: Mapping[str, Content], manifest: Mapping[str, Any], manifest_name: str,
             target: Path) -> dict[str, Any]:
    names = [manifest_name, *files]
    for name in names:
        if not NAME.fullmatch(name):
            raise DeltaError(f"{target}: {name!r} is not a plain file name.",
                             "Use letters, digits, '_', '-' and '.', and no folders.")
    if len({name.lower() for name in names}) < len(names):
        raise DeltaError(f"{target}: two files have the same name on some systems: {listing(sorted(names))}.",
                         "Give them different names.")
    if taken := sorted({"files", "self"} & set(manifest)):
        raise DeltaError(f"{target}: {manifest_name}: the key {taken[0]!r} is taken.", "Rename it.")
    return plain(manifest, manifest_name)


def _target(target: Path) -> Path:
    target = Path(target).absolute()
    if target.name in ("", ".."):
        raise DeltaError(f"{target}: cannot be written as one folder.", "Name the folder itself.")
    return target


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{uuid.uuid4().hex}-{target.name}")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _verifies(folder: Path, manifest_name: str) -> bool:
    try:
        verify_folder(folder, manifest_name=manifest_name)
    except (DeltaError, OSError):
        return False
    return True


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):   # some network disks cannot sync a folder
            raise
    finally:
        os.close(handle)


def _lock(folder: Path, wait: float = 0.0) -> int:
    """A handle that locks the folder until it is closed or its process dies; -1 where that is impossible.

    Errors: BlockingIOError when another holds it for longer than `wait` seconds.
    """
    if fcntl is None:
        return -1
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(handle)
                raise
            time.sleep(0.01)
        except OSError:                                     # a file system without locks
            os.close(handle)
            return -1


def _unlock(handle: int) -> None:
    if handle >= 0 and fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)                  # a forked child may hold a copy of the handle
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _lock(folder, _PATIENCE)
    try:
        yield
    finally:
        _unlock(handle)


def _alive(folder: Path) -> bool:
    try:
        _unlock(_lock(folder))
    except BlockingIOError:
        return True
    return False
