"""The fault injector itself: it kills where it says, fails what it says, and leaves this process alone."""
import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from slimtune.testing.kill import failing_io, file_operations, kill_points, run_killed, run_killed_after


def work(home: Path) -> None:
    (home / "a").mkdir()
    with (home / "a" / "x").open("w") as file:
        file.write("hello")
        file.flush()
        os.fsync(file.fileno())
    (home / "a" / "x").rename(home / "a" / "y")
    (home / "a" / "y").read_text()                          # a read is no operation
    (home / "a" / "y").unlink()
    (home / "a").rmdir()


def test_operations_by_name(tmp_path: Path):
    seen = file_operations(lambda: work(tmp_path))
    assert [line.split()[0] for line in seen] == ["os.mkdir", "open", "os.fsync", "os.rename", "os.remove", "os.rmdir"]
    assert seen[2] == f"os.fsync {tmp_path / 'a' / 'x'}"
    assert kill_points(lambda: work(tmp_path)) == 6


@pytest.mark.parametrize(("n", "left"), [(1, []), (2, ["a"]), (3, ["a", "a/x"]), (4, ["a", "a/x"]), (5, ["a", "a/y"]),
                                         (6, ["a"]), (7, [])])
def test_killed_just_before(tmp_path: Path, n: int, left: list[str]):
    assert run_killed(lambda: work(tmp_path), n) == (n < 7)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


def test_errors_of_the_action_are_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_killed(lambda: 1 / 0, 1)
    with pytest.raises(RuntimeError, match="longer than"):
        kill_points(lambda: time.sleep(60), timeout=0.2)
    with pytest.raises(RuntimeError, match="signal 15"):
        run_killed(lambda: os.kill(os.getpid(), signal.SIGTERM), 1)


def test_killed_after_a_time(tmp_path: Path):
    assert run_killed_after(lambda: time.sleep(60), 0.1)
    assert not run_killed_after(lambda: work(tmp_path), 60)


@pytest.mark.parametrize("n", range(1, 7))
def test_each_operation_fails(tmp_path: Path, n: int):
    name = ("mkdir", "open", "fsync", "rename", "remove", "rmdir")[n - 1]
    with failing_io(n, errno.EIO) as disk, pytest.raises(OSError, match="Input/output") as caught:
        work(tmp_path)
    assert caught.value.errno == errno.EIO
    assert (disk.failed, len(disk.seen)) == (1, n)
    assert name in disk.seen[-1]
    assert os.fsync.__name__ == "fsync"                     # the real one is back


def test_sticky_and_threads(tmp_path: Path):
    failed = []

    def touch(name: str) -> None:
        try:
            (tmp_path / name).write_text("")
        except OSError as error:
            failed.append((name, error.errno))

    with failing_io(2, errno.ENOSPC, sticky=True):
        for name in "abc":
            thread = threading.Thread(target=touch, args=(name,))
            thread.start()
            thread.join()
    touch("d")
    assert failed == [("b", errno.ENOSPC), ("c", errno.ENOSPC)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
