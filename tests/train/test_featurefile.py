"""The cache's folder: what is wrong, stale, damaged or half made is never read, and a killed filling goes on."""
import errno
import logging
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from test_features import CACHED, METHODS, opened, still
from train_toys import entries, rows, run, sha

import slimtune as st
from slimtune.errors import DataError, TrainError
from slimtune.testing.kill import failing_io, file_operations, run_killed
from slimtune.train import Interrupted, featurefile, fill

M = st.methods


def test_a_full_disk_is_known_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 100))
    with pytest.raises(TrainError, match=r"needs about 16\.\d kB, and the disk has 0\.1 kB free"):
        opened(still(M.LinearProbe()), tmp_path)
    tokens = sum(len(row["input_ids"]) for row in rows())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, tokens * 32 * 4))
    opened(still(M.LinearProbe()), tmp_path)
    assert (tmp_path / "features" / "encoder.1.bin").stat().st_size == tokens * 32 * 4


def other_model(delta):
    with torch.no_grad():
        delta.model.bert.encoder.layer[0].output.dense.weight[3, 5] += 0.1


CHANGES = {
    "another backbone": lambda d: (other_model(d), {}), "other examples": lambda d: (None, {"data": rows(seed=3)}),
    "another precision": lambda d: (None, {"precision": "bfloat16"}),
    "another config": lambda d: (setattr(d.model.config, "layer_norm_eps", 1e-3), {}),
    r"encoder\.1 is kept as": lambda d: (None, {"cache_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_cache_of_something_else_is_refused_or_in_the_run_filled_anew(tmp_path, what, caplog):
    there, named = tmp_path / "features", str(tmp_path / "features")
    opened(still(M.LinearProbe()), tmp_path)
    before = (there / "features.json").read_bytes()
    delta = still(M.LinearProbe())
    _, changes = CHANGES[what](delta)
    with pytest.raises(DataError, match=f"of something else: .*{what}"):
        opened(delta, tmp_path, cache=named, **changes)
    assert (there / "features.json").read_bytes() == before
    with caplog.at_level(logging.WARNING, "slimtune"):
        opened(delta, tmp_path, **changes)
    assert "It is filled anew." in caplog.text
    assert (there / "features.json").read_bytes() != before


@pytest.mark.parametrize("harm", ["flip", "cut", "lost", "manifest"])
def test_a_damaged_cache_is_refused_or_in_the_run_filled_anew(tmp_path, harm, caplog):
    path = tmp_path / "features" / ("features.json" if harm == "manifest" else "encoder.1.bin")
    opened(still(M.LinearProbe()), tmp_path)
    data = bytearray(path.read_bytes())
    if harm == "lost":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-4] if harm == "cut" else data)
    with pytest.raises(DataError, match="damaged"):
        opened(still(M.LinearProbe()), tmp_path, cache=str(tmp_path / "features"))
    with caplog.at_level(logging.WARNING, "slimtune"):
        opened(still(M.LinearProbe()), tmp_path)
    assert "damaged" in caplog.text


def test_a_folder_of_anything_else_is_not_touched(tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "thesis.tex").write_text("x")
    for cache in (True, str(tmp_path / "features")):
        with pytest.raises(DataError, match=r"thesis\.tex|no feature cache"):
            opened(still(M.LinearProbe()), tmp_path, cache=cache)
    assert entries(tmp_path / "features") == ["thesis.tex"]


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_killed_at_any_file_operation_the_filling_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(featurefile, "EVERY", 0.0)
    delta = still(M.LinearProbe())
    opened(delta, tmp_path / "whole")
    wanted = content(tmp_path / "whole" / "features")
    points = file_operations(lambda: opened(delta, tmp_path / "counted"))
    assert len(points) > 20
    for n in range(1, len(points) + 1, 4):
        folder = tmp_path / "run"
        assert run_killed(lambda folder=folder: opened(delta, folder), n), points[n - 1]
        opened(delta, folder)
        assert content(folder / "features") == wanted, points[n - 1]
        assert entries(folder) == ["features"], points[n - 1]
        shutil.rmtree(folder)
        with failing_io(n, errno.ENOSPC), pytest.raises(TrainError, match="could not be written: No space left"):
            opened(delta, folder)
        opened(delta, folder)
        assert content(folder / "features") == wanted, points[n - 1]
        shutil.rmtree(folder)


def test_told_to_stop_while_it_is_filled(tmp_path, monkeypatch):
    count, plain = [], fill.states

    def states(*args):
        count.append(0)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(fill, "states", states)
    with pytest.raises(Interrupted, match=r"interrupted by SIGTERM while the feature cache was filled: \d+ of 22"):
        run(tmp_path / "run", still(METHODS["partial_k"]), CACHED)
    first = len(count)
    delta, _ = run(tmp_path / "run", still(METHODS["partial_k"]), CACHED)
    again = len(count) - first
    whole, _ = run(tmp_path / "whole", still(METHODS["partial_k"]), CACHED)
    assert again == len(count) - first - again - (first - 1)  # one more to know the size
    assert sha(delta) == sha(whole)


def test_half_a_cache_of_something_else_is_not_gone_on_with(tmp_path, monkeypatch):
    plain = fill.states

    def states(delta, at, batch):
        if batch["input_ids"].shape[1] < 8:
            raise RuntimeError("stopped")
        return plain(delta, at, batch)

    monkeypatch.setattr(featurefile, "EVERY", 0.0)
    monkeypatch.setattr(fill, "states", states)
    with pytest.raises(RuntimeError, match="stopped"):
        opened(still(M.LinearProbe()), tmp_path)
    monkeypatch.setattr(fill, "states", plain)
    assert entries(tmp_path / ".part-features") == ["encoder.1.bin", "filling.json", "index.safetensors"]
    opened(still(M.LinearProbe()), tmp_path, rows(seed=1))
    opened(still(M.LinearProbe()), tmp_path / "whole", rows(seed=1))
    assert content(tmp_path / "features") == content(tmp_path / "whole" / "features")


def test_two_do_not_fill_one_cache(tmp_path):
    filling = [featurefile.Filling(tmp_path / "features", {}, {"a": (2, torch.float32)}, 1) for _ in range(2)]
    with filling[0].opened():
        with pytest.raises(TrainError, match="another process is filling"), filling[1].opened():
            pass
        filling[0].add([0], {"a": torch.ones(1, 3, 2)})
        filling[0].finish()
    assert entries(tmp_path) == ["features"]
