"""A damaged checkpoint is passed over with a warning that names it, or refused: never silently another model."""
import json
import os
import shutil

import pytest
import torch
from train_toys import SPEC, run, sha

from slimtune.core.manifest import render, seal
from slimtune.errors import DeltaError, TrainError
from slimtune.train import TrainSpec, last_checkpoint
from slimtune.train.checkpoint import MANIFEST, checkpoints, prune, read_checkpoint, step_of

THREE = TrainSpec(**{**SPEC.model_dump(), "epochs": 1, "save_every": 1, "keep": 9, "log_every": 1})
FILES = [MANIFEST, "delta.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer_state.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    delta, _ = run(folder, spec=THREE)
    shutil.rmtree(folder / "checkpoint-3")
    return folder, sha(delta)


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def cut(sixteenths):
    def fault(path):
        data = path.read_bytes()
        path.write_bytes(data[:len(data) * sixteenths // 16])
    return fault


def flip(share):
    def fault(path):
        data = bytearray(path.read_bytes())
        data[int((len(data) - 1) * share)] ^= 1
        path.write_bytes(bytes(data))
    return fault


def from_the_other(path):
    """The same file of the checkpoint before: valid in itself, of another step."""
    shutil.copy(path.parent.with_name("checkpoint-1") / path.name, path)


FAULTS = {"missing": missing, "empty": empty, "longer": longer, "linked": linked,
          **{f"cut to {i}/16": cut(i) for i in (1, 4, 8, 12, 15)},
          **{f"flipped at {share:.0%}": flip(share) for share in (0, 0.1, 0.35, 0.6, 0.85, 1)}}


@pytest.mark.parametrize("name", FILES)
def test_every_fault_is_found(whole, tmp_path, caplog, name):
    for what, fault in {**FAULTS, "from the other": from_the_other}.items():
        if name == "trainer_state.json" and what == "from the other":
            assert (whole[0] / "checkpoint-1" / name).read_bytes() != (whole[0] / "checkpoint-2" / name).read_bytes()
        folder = tmp_path / what.replace("/", "-")
        shutil.copytree(whole[0], folder)
        fault(folder / "checkpoint-2" / name)
        caplog.clear()
        found = last_checkpoint(folder)
        if name == MANIFEST and what == "from the other":   # sealed, but its hashes and name are another's
            assert "checkpoint-2" in caplog.text
        assert found == folder / "checkpoint-1", what
        assert str(folder / "checkpoint-2") in caplog.text, what
        with pytest.raises(DeltaError) as caught:
            read_checkpoint(folder / "checkpoint-2")
        assert "checkpoint-2" in str(caught.value), what


@pytest.mark.parametrize("name", FILES)
def test_a_run_falls_back_and_ends_the_same(whole, tmp_path, caplog, name):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    flip(0.5)(folder / "checkpoint-2" / name)
    delta, result = run(folder, spec=THREE)
    assert result.resumed_from == folder / "checkpoint-1"
    assert sha(delta) == whole[1]
    assert "checkpoint passed over" in caplog.text
    assert "renamed to broken-checkpoint-2" in caplog.text     # its step was saved again
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def test_with_none_left_the_run_starts_over_and_says_so(whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for path in checkpoints(folder):
        missing(path / "rng.safetensors")
    delta, result = run(folder, spec=THREE)
    assert result.resumed_from is None
    assert sha(delta) == whole[1]
    assert "none of its checkpoints verifies; the run starts over" in caplog.text


def test_one_that_was_asked_for_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    flip(0.5)(folder / "checkpoint-2" / "optimizer.safetensors")
    with pytest.raises(DeltaError, match=r"optimizer.safetensors does not match its manifest"):
        run(folder, spec=THREE, resume=folder / "checkpoint-2")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-1"]


def forged(change):
    def fault(folder):
        body = json.loads((folder / MANIFEST).read_bytes())
        change(body)
        (folder / MANIFEST).write_bytes(render(seal(body)))
    return fault


@pytest.mark.parametrize("change", [
    lambda body: body.update(format="slimtune-delta"), lambda body: body.update(format_version=99),
    lambda body: body.update(format_version=True), lambda body: body.update(step=3), lambda body: body.pop("step"),
    lambda body: body["files"].pop("rng.safetensors")])
def test_a_resealed_manifest_of_another_kind_is_refused(whole, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    forged(change)(folder / "checkpoint-2")
    assert last_checkpoint(folder) == folder / "checkpoint-1"
    with pytest.raises(DeltaError):
        read_checkpoint(folder / "checkpoint-2")


@pytest.mark.parametrize(("change", "match"), [
    (lambda body: body["delta"]["methods"][0].update(rank=4), "another method"),
    (lambda body: body["delta"]["base"].update(exact="0" * 32), "another backbone"),
    (lambda body: body["optimizer"][0]["names"].reverse(), "groups of tensors"),
    (lambda body: body["scheduler"].pop("last_epoch"), "scheduler is of another kind")])
def test_a_resealed_manifest_that_does_not_fit_is_refused(whole, tmp_path, change, match):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    forged(change)(folder / "checkpoint-2")
    with pytest.raises(DeltaError, match=match):
        run(folder, spec=THREE)


def test_a_copy_under_another_name_is_refused(whole, tmp_path, caplog):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.copytree(whole[0] / "checkpoint-1", tmp_path / "run" / "checkpoint-7")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert "holds step 1, which is not its name's" in caplog.text


def test_a_lost_best_checkpoint_is_told(tmp_path, caplog):
    spec = TrainSpec(**{**THREE.model_dump(), "eval_every": 1, "best": "loss", "epochs": 2})
    _, result = run(tmp_path / "run", spec=spec)
    assert result.best is not None
    flip(0.5)(result.best / "delta.safetensors")
    if step_of(result.best) == 6:
        with pytest.raises((DeltaError, TrainError)):
            read_checkpoint(result.best)
    run(tmp_path / "run", spec=spec)
    assert result.best.name in caplog.text


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    from train_toys import attached

    from slimtune.train.checkpoint import Checkpoint, write_checkpoint

    state = {name: tensor.clone() for name, tensor in attached().state().items()}
    state["head.classifier.bias"][0] = torch.nan
    with pytest.raises(DeltaError, match=r"head.classifier.bias holds NaN"):
        write_checkpoint(tmp_path, Checkpoint(1, state, {}, {}, {}, "{}"))
    assert not os.listdir(tmp_path)                         # noqa: PTH208


def test_prune_keeps_the_newest_the_best_and_what_comes_after(tmp_path):
    for step in (1, 2, 3, 4, 5, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    prune(tmp_path / "checkpoint-5", 2, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-9", "checkpoint-x"]
