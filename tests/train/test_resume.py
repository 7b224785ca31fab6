"""A stopped run goes on bitwise as if it had not been stopped, from every step, with dropout on."""
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train_toys import SPEC, accuracy, attached, collate, copy_run, rows, run, sha

import slimtune as st
from slimtune.errors import RecipeError, TrainError
from slimtune.train import TrainSpec, fit
from slimtune.train.checkpoint import checkpoints

EVERY = SPEC.model_copy(update={"save_every": 1, "keep": 99})
METHODS = {"lora": st.methods.LoRA(rank=2, dropout=0.1), "full": st.methods.Full(),
           "prefix": st.methods.PrefixTuning(length=3), "lst": st.methods.LST()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    delta, result = run(folder, spec=EVERY)
    return folder, sha(delta), result


def test_two_runs_are_bitwise_equal_whatever_was_drawn_before(whole, tmp_path):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    delta, result = run(tmp_path, spec=EVERY)
    assert sha(delta) == whole[1]
    assert result.history == whole[2].history


def test_the_generators_are_given_back(tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    run(tmp_path)
    after = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    assert torch.equal(after[0], torch.rand(2))
    assert after[1] == random.random()


def test_dropout_is_on(tmp_path):
    """Without it the tests here would prove little."""
    still = st.attach(st.testing.tiny("bert", dropout=False), st.methods.LoRA(rank=2))
    assert sha(run(tmp_path / "a", still)[0]) != sha(run(tmp_path / "b")[0])


@pytest.mark.parametrize("step", range(1, 9))
def test_resume_from_every_step(whole, tmp_path, step):
    """Three steps an epoch: 3 and 6 are the boundaries between epochs."""
    folder, wanted, result = whole
    copy_run(folder, tmp_path / "run", step)
    torch.manual_seed(step)                                 # a new process has other random numbers
    delta, again = run(tmp_path / "run", spec=EVERY)
    assert again.resumed_from == tmp_path / "run" / f"checkpoint-{step}"
    assert sha(delta) == wanted
    assert again.history == result.history
    assert again.metrics == result.metrics


@pytest.mark.parametrize(("name", "schedule"), [("lora", "cosine"), ("full", "constant"), ("prefix", "cosine"),
                                                ("lst", "constant")])
def test_resume_with_other_methods(tmp_path, name, schedule):
    spec = EVERY.model_copy(update={"schedule": schedule, "head_learning_rate": 3e-3, "weight_decay": 0.01, "epochs": 2,
                                    "eval_every": 2})
    delta, result = run(tmp_path / "whole", attached(METHODS[name]), spec)
    for step in (1, 4):
        copy_run(tmp_path / "whole", tmp_path / f"{step}", step)
        again, other = run(tmp_path / f"{step}", attached(METHODS[name]), spec)
        assert sha(again) == sha(delta), step
        assert other.history == result.history


def test_resume_in_another_process(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 4)
    code = ("import sys; from pathlib import Path; from train_toys import run, sha, SPEC; "
            "print(sha(run(Path(sys.argv[1]), spec=SPEC.model_copy(update={'save_every': 1, 'keep': 99}))[0]))")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}, check=True)
    assert done.stdout.strip() == whole[1]


def test_a_finished_run_is_not_run_again(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 9)
    events = []
    delta, result = run(tmp_path / "run", spec=EVERY, report=events.append)
    assert sha(delta) == whole[1]
    assert [event["event"] for event in events] == ["start"]
    assert result.metrics == whole[2].metrics


def test_lines_after_the_resumed_step_are_dropped(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 5)
    journal = tmp_path / "run" / "metrics.jsonl"
    journal.write_text(journal.read_text() + '{"step": 6, "lo')     # killed while it wrote
    _, result = run(tmp_path / "run", spec=EVERY)
    assert result.history == whole[2].history


def test_false_starts_over(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 5)
    delta, result = run(tmp_path / "run", spec=SPEC.model_copy(update={"seed": 1}), resume=False)
    assert result.resumed_from is None
    assert sha(delta) != whole[1]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-9", "checkpoint-6"]
    assert result.history[0]["step"] == 2


def test_a_path_goes_back(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 9)
    delta, result = run(tmp_path / "run", spec=EVERY, resume=tmp_path / "run" / "checkpoint-4")
    assert result.resumed_from == tmp_path / "run" / "checkpoint-4"
    assert sha(delta) == whole[1]
    with pytest.raises(TrainError, match="not a checkpoint of"):
        run(tmp_path / "other", spec=EVERY, resume=tmp_path / "run" / "checkpoint-4")


def test_another_spec_or_other_data_are_refused(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 4)
    with pytest.raises(RecipeError, match=r"train.learning_rate: this run was begun with 0.01, not with 0.02"):
        run(tmp_path / "run", spec=EVERY.model_copy(update={"learning_rate": 0.02}))
    with pytest.raises(RecipeError, match="other training data"):
        fit(attached(), rows(seed=2), None, collate, accuracy, EVERY, tmp_path / "run")
    free = EVERY.model_copy(update={"keep": 1, "eval_batch_size": 3})
    assert sha(run(tmp_path / "run", spec=free)[0]) == whole[1]


def test_when_to_save_and_log_may_change(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 3)
    events = []
    free = EVERY.model_copy(update={"save_every": 4, "log_every": 3, "eval_every": 5})
    delta, _ = run(tmp_path / "run", spec=free, report=events.append)
    assert sha(delta) == whole[1]
    assert [e["step"] for e in events if e["event"] == "save"] == [4, 8, 9]
    assert [e["step"] for e in events if e["event"] == "log"] == [6, 9]
    assert [e["step"] for e in events if e["event"] == "evaluate"] == [5, 9]


def test_another_method_or_base_is_refused(whole, tmp_path):
    copy_run(whole[0], tmp_path / "run", 4)
    with pytest.raises(ValueError, match="another method"):
        run(tmp_path / "run", attached(st.methods.LoRA(rank=3, dropout=0.1)), EVERY)
    with pytest.raises(ValueError, match="another backbone"):
        run(tmp_path / "run", st.attach(st.testing.tiny("bert", seed=1, dropout=True),
                                        st.methods.LoRA(rank=2, dropout=0.1)), EVERY)


def test_a_run_may_move(tmp_path):
    spec = TrainSpec(**{**EVERY.model_dump(), "best": "loss"})
    delta, result = run(tmp_path / "here", spec=spec)
    (tmp_path / "here").rename(tmp_path / "there")
    again, other = run(tmp_path / "there", spec=spec)
    assert other.best == tmp_path / "there" / result.best.name
    assert sha(again) == sha(delta)
