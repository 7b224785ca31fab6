"""kill -9 of a private run: what was spent is never forgotten, and a step taken again is spent once."""
import random
import shutil

import pytest
from train_toys import SPEC, attached, run, sha

from slimtune.privacy import PrivacySpec
from slimtune.testing.kill import file_operations, run_killed
from slimtune.train import TrainSpec, last_checkpoint
from slimtune.train.checkpoint import checkpoints, read_checkpoint, step_of

SHORT = TrainSpec(**{**SPEC.model_dump(exclude={"gradient_accumulation"}), "steps": 3, "save_every": 1,
                     "eval_every": 3, "log_every": 1, "keep": 2, "clip": None})
SEEDED = PrivacySpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", batch_size=6, seed=4)
SECRET = SEEDED.model_copy(update={"seed": None})
pytestmark = pytest.mark.usefixtures("quick_gc")


def private(folder, privacy=SEEDED):
    return run(folder, attached(), SHORT, privacy=privacy)


def check_ledgers(folder) -> int:
    """Every checkpoint that is there accounts for each step that made it; the newest one's."""
    for path in checkpoints(folder):
        spent = read_checkpoint(path).facts["privacy"]["history"]
        assert sum(count for _, _, count in spent) == step_of(path)
    newest = last_checkpoint(folder)
    return step_of(newest) if newest else 0


def test_killed_at_file_operations_it_neither_forgets_nor_spends_twice(tmp_path):
    delta, whole = private(tmp_path / "whole")
    points = len(file_operations(lambda: private(tmp_path / "counted")))
    seen = set()
    for n in range(3, points + 1, points // 7):
        folder = tmp_path / "run"
        assert run_killed(lambda folder=folder: private(folder), n)
        seen.add(check_ledgers(folder))
        again, result = private(folder)
        assert result.privacy == whole.privacy, n       # steps, history and epsilon are those of one run
        assert result.privacy["steps"] == 3
        assert sha(again) == sha(delta), n              # steps taken again released the same noisy gradients
        shutil.rmtree(folder)
    assert seen >= {0, 1, 2}, "killed before, between and behind the saves"


def test_steps_that_are_lost_are_taken_again_with_the_secret_of_the_checkpoint(tmp_path):
    """Two processes that resume one stopped run release the same thing, though nobody knows the secret."""
    points, draw = len(file_operations(lambda: private(tmp_path / "counted", SECRET))), random.Random(0)
    done = 0
    while done < 2:
        folder = tmp_path / f"run{done}"
        shutil.rmtree(folder, ignore_errors=True)
        assert run_killed(lambda folder=folder: private(folder, SECRET), draw.randint(points // 3, points - 8))
        if check_ledgers(folder) in (0, 3):
            continue
        shutil.copytree(folder, tmp_path / f"twin{done}")
        found = [private(tmp_path / f"{name}{done}", SECRET) for name in ("run", "twin")]
        assert sha(found[0][0]) == sha(found[1][0])
        assert found[0][1].privacy == found[1][1].privacy
        assert found[0][1].privacy["steps"] == 3
        done += 1


def test_killed_again_and_again_it_ends_with_the_ledger_of_one_run(tmp_path):
    draw, spent = random.Random(1), [0]
    for _ in range(5):
        run_killed(lambda: private(tmp_path / "run", SECRET), draw.randint(10, 40))
        spent.append(check_ledgers(tmp_path / "run"))
    assert spent == sorted(spent)
    _, result = private(tmp_path / "run", SECRET)
    assert result.privacy["steps"] == 3
