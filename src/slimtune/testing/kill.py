"""Kill a save at every file operation, or make the disk fail there, and see what is left.

An operation is an open for writing, a rename, remove, mkdir, rmdir, link or truncate (Python's audit events),
an fsync, a change of mode, or the native writer of safetensors. Reads are not counted.

    for n in range(1, kill_points(save) + 1):
        run_killed(save, n)                 # SIGKILL just before the n-th operation
        assert read_delta(folder) ...       # the old one or the new one, never half of one
"""
import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch

_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watchers: list[Callable[[str], None]] = []
_hooked = False


@dataclass
class Disk:
    """What `failing_io` saw: the operations so far, and how many of them failed."""

    seen: list[str] = field(default_factory=list)
    failed: int = 0


def file_operations(action: Callable[[], object], *, timeout: float = 120.0) -> list[str]:
    """The file operations of `action`, in order, as words ("os.rename /a/b"), run in a forked child.

    Errors: RuntimeError when the action raises (with its traceback) or takes longer than `timeout` seconds.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     [line.split()[0] for line in file_operations(lambda: Path(home, "x").write_text("hello"))]
        ['open']
    """
    seen: list[str] = []
    _, report = _fork(action, seen.append, lambda: "\n".join(seen), timeout)
    return report.splitlines()


def kill_points(action: Callable[[], object], *, timeout: float = 120.0) -> int:
    """How many file operations `action` makes: `run_killed` takes 1 to this number."""
    return len(file_operations(action, timeout=timeout))


def run_killed(action: Callable[[], object], n: int, *, timeout: float = 120.0) -> bool:
    """Run `action` in a forked child that gets SIGKILL just before its n-th file operation (from 1).

    True if it was killed, False if it ended before. Errors: RuntimeError when the action raises first.
    """
    count = 0

    def watch(_: str) -> None:
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return _fork(action, watch, str, timeout)[0]


def run_killed_after(action: Callable[[], object], seconds: float, *, timeout: float = 120.0) -> bool:
    """Run `action` in a forked child that gets SIGKILL after that time; True if it had not ended by then."""
    return _fork(action, None, str, timeout, seconds)[0]


@contextlib.contextmanager
def failing_io(n: int, errno: int, *, sticky: bool = False) -> Iterator[Disk]:
    """Inside it, the n-th file operation (from 1) raises OSError(errno) instead of happening.

    With `sticky` all later ones fail as well, as on a disk that stays full. Every thread counts.

    Example:
        >>> import errno
        >>> with failing_io(1, errno.ENOSPC) as disk:
        ...     try:
        ...         Path("never-written").write_text("hello")
        ...     except OSError as error:
        ...         print(error.strerror, disk.failed)
        No space left on device 1
    """
    disk = Disk()

    def watch(what: str) -> None:
        disk.seen.append(what)
        if len(disk.seen) == n or (sticky and len(disk.seen) > n):
            disk.failed += 1
            raise OSError(errno, os.strerror(errno), what.partition(" ")[2])

    with _watched(watch):
        yield disk


@contextlib.contextmanager
def _watched(watch: Callable[[str], None]) -> Iterator[None]:
    global _hooked
    if not _hooked:                                         # a hook can never be taken out: one is enough
        sys.addaudithook(_audit)
        _hooked = True
    _watchers.append(watch)
    with contextlib.ExitStack() as stack:
        for module, name in ((os, "fsync"), (os, "fdatasync"), (os, "fchmod"),
                             (safetensors.torch, "serialize_file")):
            stack.enter_context(_announced(module, name))
        try:
            yield
        finally:
            _watchers.remove(watch)


@contextlib.contextmanager
def _announced(module: Any, name: str) -> Iterator[None]:
    """A function without an audit event tells the watchers before it runs."""
    plain = getattr(module, name, None)
    if plain is None:
        yield
        return

    def announced(*args: Any, **kwargs: Any) -> Any:
        _tell(f"{module.__name__}.{name} {_path(args[1] if name == 'serialize_file' else args[0])}")
        return plain(*args, **kwargs)

    setattr(module, name, announced)
    try:
        yield
    finally:
        setattr(module, name, plain)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, int) or not isinstance(flags, int) or not flags & _WRITES:
            return
    elif event not in _EVENTS:
        return
    if "__pycache__" not in str(args[0]):
        _tell(f"{event} {_path(args[0])}")


def _tell(what: str) -> None:
    for watch in tuple(_watchers):
        watch(what)


def _path(what: Any) -> str:
    if isinstance(what, int):
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/self/fd/{what}").readlink())
        return f"handle {what}"
    return os.fsdecode(what) if isinstance(what, bytes | str | os.PathLike) else repr(what)


def _fork(action: Callable[[], object], watch: Callable[[str], None] | None, report: Callable[[], str],
          timeout: float, kill_after: float | None = None) -> tuple[bool, str]:
    """(whether the child was killed by us, what it reported)."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(action, watch, report, writer)
    os.close(writer)
    killed, text = _follow(child, reader, timeout, kill_after)
    status = os.waitpid(child, 0)[1]
    if killed is None:
        raise RuntimeError(f"the action took longer than {timeout} s and was stopped.")
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"the action died of signal {os.WTERMSIG(status)}.")
        return True, text
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"the action raised before it was killed:\n{text}")
    return False, text


def _follow(child: int, reader: int, timeout: float, kill_after: float | None) -> tuple[bool | None, str]:
    """Reads the report until the child closes it; None if it had to be stopped for taking too long."""
    limit = timeout if kill_after is None else kill_after
    end, parts, killed = time.monotonic() + limit, [], False
    while True:
        wait = max(0.0, end - time.monotonic())
        ready = select.select([reader], [], [], None if killed else wait)[0]
        if not ready:
            os.kill(child, signal.SIGKILL)
            killed = True
            continue
        part = os.read(reader, 1 << 16)
        if not part:
            break
        parts.append(part)
    os.close(reader)
    return (None if killed and kill_after is None else killed), b"".join(parts).decode(errors="replace")


def _child(action: Callable[[], object], watch: Callable[[str], None] | None, report: Callable[[], str],
           writer: int) -> NoReturn:
    """Never returns, and runs none of the parent's exit handlers."""
    code = 1
    try:
        sys.dont_write_bytecode = True
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)         # the parent's OpenMP threads are not in the child
        try:
            with _watched(watch) if watch else contextlib.nullcontext():
                action()
            text, code = report(), 0
        except BaseException:
            text = traceback.format_exc()
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(writer, data):]
    finally:
        os._exit(code)
