"""The vision benchmark: its grid, what is kept, its page, and one cell on a tiny model."""
import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from slimtune.bench import vision, vision_page
from slimtune.bench.vision_settings import SETS, SETTINGS, Setting
from slimtune.data import prepare
from slimtune.data.transform import transform_of
from slimtune.errors import SlimtuneError
from slimtune.io.images import ImageInput
from slimtune.testing import tiny


def cell(accuracy: float, title: str) -> dict:
    return {"accuracy": accuracy, "trained": 1234, "head": 10, "train_loss": 0.1, "seconds": 20.0,
            "examples": {"train": 1000, "judged": 500}, "setting": vision.said(SETTINGS[title])}


FOUND = {"cells": {"cifar10/LoRA/0": cell(0.5, "LoRA"), "cifar10/LoRA/1": cell(0.6, "LoRA"),
                   "dtd10/LoRA/0": cell(0.7, "LoRA"), "cifar10/full/0": cell(0.4, "full")},
         "validation": {title: {"cifar10": {"0.001": {"accuracy": 0.5, "setting": vision.said(
             vision.tried(title, "0.001"))}}} for title in ("LoRA", "full")}}


def test_a_part_of_the_grid_is_whole_seeds():
    grid = list(vision.cells((0, 1), ("a", "b"), ("x", "y")))
    assert len(set(grid)) == 8
    assert [seed for seed, _, _ in grid] == [0] * 4 + [1] * 4


def test_the_page_shows_mean_and_spread_and_keeps_what_people_wrote():
    page = vision_page.page(FOUND, f"# Mine\n{vision_page.BEGIN}\nold\n{vision_page.END}\nbelow\n")
    assert page.startswith("# Mine\n")
    assert page.endswith("\nbelow\n")
    assert "old" not in page
    row = next(line for line in page.splitlines() if line.startswith("| LoRA |")).split(" | ")
    assert row[3:7] == ["1,234", "0.550 ± 0.071 (2)", "0.700 (1)", "0.625"]
    full = next(line for line in page.splitlines() if line.startswith("| full |")).split(" | ")
    assert full[5:7] == ["", ""]   # not run on dtd10: no figure, and no mean
    assert "| LoRA | 0.001: 0.500 |" in page
    assert vision_page.page(FOUND, page) == page


def test_results_of_another_setting_or_budget_are_not_kept(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(FOUND | {"budget": vision.budget()}))
    assert {key: vision.read(file)[key] for key in FOUND} == FOUND
    monkeypatch.setitem(vision.SETTINGS, "full", Setting("full", 1.0, head=1.0))
    found = vision.read(file)
    assert set(found["cells"]) == {key for key in FOUND["cells"] if "LoRA" in key}
    assert found["validation"] == {"LoRA": FOUND["validation"]["LoRA"], "full": {"cifar10": {}}}
    assert "| full | 0.001" not in vision_page.page(found, "")
    monkeypatch.setattr(vision, "SIZE", 112)
    with pytest.raises(SlimtuneError, match="another budget: size"):
        vision.read(file)
    assert vision.read(tmp_path / "none.json")["cells"] == {}


def test_trying_rates_keeps_what_another_process_wrote(tmp_path, monkeypatch):
    file = tmp_path / "r.json"

    def learn(setting, ground):
        file.write_text(json.dumps(FOUND | {"budget": vision.budget()}))
        return {"accuracy": setting.rate, "train_loss": 0.1, "seconds": 1.0}

    monkeypatch.setattr(vision, "load", lambda *args: None)
    monkeypatch.setattr(vision, "learn", learn)
    vision.validate(["LoRA"], Namespace(sets=["dtd10"], images="", validate=[0.25], out=file), vision.read(file))
    found = vision.read(file)
    assert found["cells"] == FOUND["cells"]
    assert found["validation"]["full"] == FOUND["validation"]["full"]
    assert found["validation"]["LoRA"]["cifar10"] == FOUND["validation"]["LoRA"]["cifar10"]
    assert found["validation"]["LoRA"]["dtd10"]["0.25"]["accuracy"] == 0.25


def test_methods_that_are_not_here_are_skipped_and_said(monkeypatch, capsys):
    monkeypatch.setitem(vision.SETTINGS, "new", Setting("no_such_method", 1.0))
    assert vision.known(["new", "LoRA"]) == ["LoRA"]
    assert "new: there is no method 'no_such_method'; skipped" in capsys.readouterr().out
    with pytest.raises(SlimtuneError, match="Did you mean 'LoRA'"):
        vision.known(["LRoA"])
    assert {s.method for s in SETTINGS.values()} <= {*vision.method_names(), "no_such_method"}


@pytest.mark.parametrize("title", ["linear", "LoRA", "VPT-deep", "full"])
def test_a_cell_trains_and_leaves_the_model_as_it_was(tmp_path, title):
    rng = np.random.default_rng(0)
    for c in range(3):
        (tmp_path / str(c)).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{c}/{i}.png")
    spec = vision.DataSpec(task="image_classification", train=str(tmp_path), test_fraction=0.25, validation_fraction=0,
                           size=16)
    ground = vision.Ground(tiny("dinov2"), prepare(spec, transform_of(spec, ImageInput(edge=16))), seed=1)
    before = {key: value.clone() for key, value in ground.model.state_dict().items()}
    setting = SETTINGS[title]
    own = {"rank": 2} if "rank" in setting.values else {}
    found = vision.learn(Setting(setting.method, 1e-2, setting.values | own, epochs=1, cache=setting.cache), ground)
    assert found["examples"] == {"train": 18, "judged": 6}
    assert (found["trained"] > 0) == (title != "linear")
    assert all((value == before[key]).all() for key, value in ground.model.state_dict().items())


def test_the_sets_draw_what_they_say():
    for name in SETS:
        spec = vision.spec_of(name, 2, "images")
        assert (spec.train_size, spec.seed, spec.path) == (1000, 2, "images")
        assert (spec.test is None) == (spec.test_fraction > 0)
