"""Folders that appear whole or not at all: killed, failed and raced at every file operation."""
import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from slimtune.core.atomic import recover, verify_folder, write_folder
from slimtune.errors import DeltaError
from slimtune.testing.kill import failing_io, file_operations, kill_points, run_killed, run_killed_after

OLD = {"a.bin": b"old" * 9, "b.bin": b"B"}
NEW = {"a.bin": b"new" * 99, "c.bin": b"", "d.bin": lambda path: path.write_bytes(b"D" * 5)}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / "delta"


def write_old(target: Path) -> None:
    write_folder(target, OLD, {"which": "old"})


def write_new(target: Path) -> None:
    write_folder(target, NEW, {"which": "new"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(action) -> DeltaError | None:
    try:
        action()
    except DeltaError as error:
        return error
    return None


def which(target: Path) -> str:
    """"old", "new" or "none", after recovery; everything else about the disk is asserted."""
    there = recover(target)
    assert {path.name for path in target.parent.iterdir()} == ({target.name} if there else set())
    if not there:
        return "none"
    name = verify_folder(target)["which"]
    assert sorted(content(target)) == sorted([*(OLD if name == "old" else NEW), "delta.json"])
    return name


@pytest.mark.parametrize("before", ["old", "none", "empty"])
def test_kill_at_every_operation(target: Path, before: str):
    def reset() -> None:
        for path in sorted(target.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        target.parent.mkdir(exist_ok=True)
        if before == "old":
            write_old(target)
        elif before == "empty":
            target.mkdir()

    reset()
    points = kill_points(lambda: write_new(target))
    outcomes = []
    for n in range(1, points + 1):
        reset()
        assert run_killed(lambda: write_new(target), n)
        if before == "empty" and target.is_dir() and not any(target.iterdir()):
            recover(target)                                 # still the empty folder, and nothing else
            outcomes.append("empty" if [p.name for p in target.parent.iterdir()] == ["delta"] else "bad")
        else:
            outcomes.append(which(target))
    print(f"\n{points} kill points over {before}: {' '.join(outcomes)}")
    assert points >= 12
    assert set(outcomes) == {before, "new"}
    assert outcomes == sorted(outcomes, key=["empty", "none", "old", "new"].index)
    assert not run_killed(lambda: write_new(target), points + 99)
    assert which(target) == "new"


def test_kill_recovery_too(target: Path):
    """Killed while it saves, then killed while it recovers, at every pair of operations."""
    write_old(target)
    pairs = 0
    for n in range(1, kill_points(lambda: write_new(target)) + 1):
        m = 1
        while True:
            which(target)
            write_old(target)
            assert run_killed(lambda: write_new(target), n)
            if not run_killed(lambda: recover(target), m):
                break
            assert which(target) in ("old", "new")
            pairs, m = pairs + 1, m + 1
    print(f"\n{pairs} pairs of kill points")
    assert pairs > 20


def test_kill_at_random_times(target: Path):
    big = {"big.bin": os.urandom(2**21), **OLD}
    write_folder(target, big, {"which": "old"})
    start = time.perf_counter()
    write_folder(target, big, {"which": "old"})
    length = time.perf_counter() - start
    rng, killed = random.Random(0), 0
    for _ in range(50):
        killed += run_killed_after(lambda: write_folder(target, big, {"which": "new"}), rng.uniform(0, 1.5 * length))
        assert recover(target)
        assert verify_folder(target)["which"] in ("old", "new")
        assert [path.name for path in target.parent.iterdir()] == ["delta"]
    print(f"\n{killed} of 50 killed")
    assert killed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("sticky", [False, True])
def test_failing_disk_at_every_operation(target: Path, code: int, sticky: bool):
    write_old(target)
    for n in range(1, kill_points(lambda: write_new(target)) + 1):
        write_old(target)
        before = content(target)
        with failing_io(n, code, sticky=sticky) as disk:
            error = refusal(lambda: write_new(target))
        failed = error is not None
        if failed:
            assert isinstance(error.__cause__, OSError)
            assert os.strerror(code) in str(error)
            assert str(target) in str(error)
        assert disk.failed
        name = which(target)
        if not sticky:                                      # a full disk may also fail the way back: recover's work
            assert name == ("old" if failed else "new"), disk.seen
        assert failed or name == "new"
        assert name == "new" or content(target) == before


def test_order_on_disk(target: Path):
    """Everything is on the disk before it is renamed in, and the rename before the old one goes."""
    write_old(target)
    seen = file_operations(lambda: write_new(target))
    kinds = [line.split()[0] for line in seen]
    swap = max(i for i, kind in enumerate(kinds) if kind == "os.rename")
    synced = [Path(line.split()[1]).name for line in seen[:swap] if line.startswith("os.fsync")]
    assert synced[:4] == ["a.bin", "c.bin", "d.bin", "delta.json"]
    assert synced[4].startswith(".tmp-")
    assert seen[swap + 1] == f"os.fsync {target.parent}"
    assert "os.remove" not in kinds[:swap]
    assert "os.remove" in kinds[swap:]


@pytest.mark.parametrize("fill", [
    lambda t: t.symlink_to(t.parent / "elsewhere"),
    lambda t: t.write_text("a file"),
    lambda t: (t.mkdir(), (t / "thesis.tex").write_text("years of work")),
    lambda t: (write_old(t), (t / "notes.txt").write_text("mine")),
    lambda t: (write_old(t), (t / "folder").mkdir()),
    lambda t: (write_old(t), (t / "delta.json").write_text("{}")),
    lambda t: (t.mkdir(), (t / "delta.json").write_text('{"files": {"thesis.tex": {}}}')),
])
def test_never_replaces_what_others_wrote(target: Path, fill):
    target.parent.mkdir()
    fill(target)
    before = sorted((path.relative_to(target.parent), path.is_file() and path.read_bytes())
                    for path in target.parent.rglob("*"))
    with pytest.raises(DeltaError, match=r"not replaced|not a folder") as caught:
        write_new(target)
    assert str(target) in str(caught.value)
    assert before == sorted((path.relative_to(target.parent), path.is_file() and path.read_bytes())
                            for path in target.parent.rglob("*"))


def test_a_symlink_is_not_followed(target: Path, tmp_path: Path):
    write_old(tmp_path / "real")
    target.parent.mkdir()
    target.symlink_to(tmp_path / "real")
    with pytest.raises(DeltaError, match="symlink"):
        write_new(target)
    assert verify_folder(tmp_path / "real")["which"] == "old"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "delta.json", "a\0", "a\\b", "C:x",
                                  "x" * 300])
def test_bad_names(target: Path, name: str):
    with pytest.raises(DeltaError, match=r"plain file name|same name"):
        write_folder(target, {name: b""}, {})
    assert not target.parent.exists()


def test_writers_that_misbehave(target: Path):
    write_old(target)

    def raises(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyError("a bug in the writer")

    with pytest.raises(KeyError):
        write_folder(target, {"a": b"1", "b": raises}, {})
    with pytest.raises(DeltaError, match=r"beside\.bin"):
        write_folder(target, {"a": lambda path: (path.write_bytes(b""), path.with_name("beside.bin").touch())}, {})
    with pytest.raises(DeltaError, match="No such file"):
        write_folder(target, {"a": lambda path: None}, {})
    assert which(target) == "old"


def test_recover_never_deletes_the_only_good_copy(target: Path):
    write_old(target)
    aside = target.with_name(f".old-{'0' * 32}-delta")
    target.rename(aside)
    assert which(target) == "old"                           # missing: brought back
    target.rename(aside)
    target.mkdir()
    (target / "delta.json").write_text("damaged")
    recover(target)
    assert verify_folder(aside)["which"] == "old"           # present but damaged: the good one stays
    strangers = [target.with_name(".tmp-notes-delta"), target.with_name(f".tmp-{'0' * 32}-other")]
    for path in strangers:
        path.mkdir()
    recover(target)
    assert all(path.exists() for path in strangers)         # other targets' and other people's


def test_the_next_write_tidies_up(target: Path):
    write_old(target)
    for n in (6, 14):                                       # half written; and complete but not in place
        assert run_killed(lambda: write_new(target), n)
    assert len(list(target.parent.iterdir())) > 1
    write_new(target)
    assert [path.name for path in target.parent.iterdir()] == ["delta"]
    assert run_killed(lambda: write_old(target), 6)
    before = len(list(target.parent.iterdir()))
    with failing_io(7, errno.ENOSPC):                       # even a write that fails has freed the space first
        assert refusal(lambda: write_old(target))
    assert [before, len(list(target.parent.iterdir()))] == [2, 1]


def test_a_living_writer_is_left_alone(target: Path):
    def tidied(path: Path) -> None:
        assert not run_killed(lambda: recover(target), 10**6)
        recover(target)
        path.write_bytes(b"still here")

    write_folder(target, {"a.bin": tidied}, {"which": "new"})
    assert content(target)["a.bin"] == b"still here"


def test_many_writers_and_readers(target: Path):
    """Whatever the order, a reader finds a whole folder, and nothing is left over."""
    write_folder(target, {"a.bin": b"0" * 1000}, {"n": "0"})
    stop, errors = threading.Event(), []

    def writer(n: str) -> None:
        for _ in range(8):
            write_folder(target, {"a.bin": n.encode() * 1000}, {"n": n})

    def reader() -> None:
        while not stop.is_set():
            try:
                verify_folder(target)
            except DeltaError as error:
                errors.append(error)

    watching = threading.Thread(target=reader)
    writing = [threading.Thread(target=writer, args=(str(n),)) for n in range(3)]
    for thread in (watching, *writing):
        thread.start()
    for thread in writing:
        thread.join()
    stop.set()
    watching.join()
    assert not errors
    assert content(target)["a.bin"] == verify_folder(target)["n"].encode() * 1000
    assert [path.name for path in target.parent.iterdir()] == ["delta"]
