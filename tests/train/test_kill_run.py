"""kill -9 at every file operation of a run; it then resumes unaided and ends bitwise as if nothing had happened."""
import dataclasses
import errno
import random
import shutil

import pytest
from train_toys import SPEC, attached, entries, run, sha

from slimtune.errors import TrainError
from slimtune.testing.kill import failing_io, file_operations, run_killed, run_killed_after
from slimtune.train import TrainSpec, last_checkpoint
from slimtune.train.checkpoint import MANIFEST, read_checkpoint, step_of, verify_folder, write_checkpoint

SHORT = TrainSpec(**{**SPEC.model_dump(), "steps": 2, "save_every": 1, "eval_every": 2, "log_every": 1, "keep": 1})
"""Two steps, both saved; the second save deletes the first checkpoint."""
ENDS_WITH = ["checkpoint-2", "metrics.jsonl"]
pytestmark = pytest.mark.usefixtures("quick_gc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    delta, result = run(folder, spec=SHORT)
    assert entries(folder) == ENDS_WITH
    return sha(delta), result.history


def test_killed_at_every_file_operation(whole, tmp_path, capsys):
    points = file_operations(lambda: run(tmp_path / "counted", spec=SHORT))
    assert len(points) > 40
    for n in range(1, len(points) + 1):
        folder = tmp_path / "run"
        assert run_killed(lambda folder=folder: run(folder, spec=SHORT), n), points[n - 1]
        check_resumes(folder, whole, f"killed before operation {n}: {points[n - 1]}")
    with capsys.disabled():
        print(f"\n  kill -9 at {len(points)} file operations of a run of two saves: all resumed bitwise")


def test_killed_at_random_times(whole, tmp_path):
    draw = random.Random(0)
    for _ in range(6):
        folder = tmp_path / "run"
        run_killed_after(lambda folder=folder: run(folder, spec=SHORT), draw.uniform(0.05, 0.5))
        check_resumes(folder, whole, "killed at a random time")


def test_killed_again_and_again(whole, tmp_path):
    """Each attempt begins on what the ones before left, and none loses what they had saved."""
    draw, steps = random.Random(1), []
    for _ in range(8):
        run_killed(lambda: run(tmp_path / "run", spec=SHORT), draw.randint(4, 35))
        path = last_checkpoint(tmp_path / "run")
        steps.append(step_of(path) if path else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 0
    check_resumes(tmp_path / "run", whole, "killed again and again")


def check_resumes(folder, whole, where):
    delta, result = run(folder, spec=SHORT)
    assert sha(delta) == whole[0], where
    assert result.history == whole[1], where
    assert entries(folder) == ENDS_WITH, where
    verify_folder(folder / "checkpoint-2", manifest_name=MANIFEST)
    shutil.rmtree(folder)


def test_a_save_over_a_checkpoint_that_is_killed(tmp_path):
    """At every operation the old one or the new one is found, and nothing else is left."""
    folder = tmp_path / "run"
    run(folder, spec=SHORT)
    found = read_checkpoint(folder / "checkpoint-2")
    new = dataclasses.replace(found, facts={**found.facts, "run": "new"})
    for key in ("files", "self", "format", "format_version", "step", "slimtune"):
        new.facts.pop(key)
    points = file_operations(lambda: write_checkpoint(tmp_path / "run", new))
    states = []
    for n in range(1, len(points) + 1):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        write_checkpoint(tmp_path / "again", dataclasses.replace(new, facts={**new.facts, "run": "old"}))
        assert run_killed(lambda: write_checkpoint(tmp_path / "again", new), n)
        path = last_checkpoint(tmp_path / "again")
        assert path is not None, points[n - 1]
        states.append(read_checkpoint(path).facts["run"])
        assert entries(tmp_path / "again") == ["checkpoint-2"], points[n - 1]
    assert states == sorted(states, reverse=True)
    assert set(states) == {"old", "new"}


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(whole, tmp_path, kind):
    """From the start of the second save on, at each of its operations, nothing can be written."""
    points = file_operations(lambda: run(tmp_path / "counted", spec=SHORT))
    starts = [i for i, point in enumerate(points, 1) if point.startswith("os.mkdir") and ".tmp-" in point]
    ends = next(i for i, point in enumerate(points, 1) if i > starts[1] and point.startswith("os.rename"))
    for n in range(starts[1], ends + 1, 3):
        folder = tmp_path / f"{n}"
        with failing_io(n, kind, sticky=True) as disk, pytest.raises(TrainError) as caught:
            run(folder, spec=SHORT)
        assert disk.failed
        assert "step 2: the checkpoint was not saved" in str(caught.value)
        assert "checkpoint-1; the run resumes from it" in str(caught.value)
        assert caught.value.exit_code == 1
        check_resumes(folder, whole, f"disk failed at {points[n - 1]}")


def test_a_disk_that_is_full_for_the_log_ends_the_run(whole, tmp_path):
    points = file_operations(lambda: run(tmp_path / "counted", spec=SHORT))
    second = [i for i, point in enumerate(points, 1) if point.endswith("metrics.jsonl")][1]
    with failing_io(second, errno.ENOSPC, sticky=True), pytest.raises(TrainError, match=r"metrics.jsonl.*No space"):
        run(tmp_path / "run", spec=SHORT)
    check_resumes(tmp_path / "run", whole, "disk full at the log")


def test_a_failing_deletion_does_not_end_the_run(whole, tmp_path, monkeypatch, caplog):
    real = shutil.rmtree

    def refuse(path, *args, **kwargs):
        if ".gone-" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr("slimtune.train.checkpoint.shutil.rmtree", refuse)
    delta, _ = run(tmp_path / "run", attached(), SHORT)
    assert sha(delta) == whole[0]
    assert "an old checkpoint could not be deleted" in caplog.text
