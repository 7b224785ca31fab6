"""What stands in a run's folder, and how it is written."""
import json
import os

import pytest

from slimtune.errors import RecipeError
from slimtune.recipe import Recipe, folder


def of(tmp_path, **nodes):
    tree = {"model": "m", "method": "lora", "data": {"task": "causal_lm", "train": "x"},
            "output": str(tmp_path / "run")}
    return Recipe(**(tree | nodes))


def begin(recipe):
    with folder.begun(recipe, resume=False):
        assert (recipe.folder / "recipe.yaml").is_file()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    folder.write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write_json(path, {"a": float("nan")})


def test_a_folder_is_begun_once_and_kept_for_its_recipe(tmp_path):
    folder.check_folder(of(tmp_path), resume=False)
    assert not (tmp_path / "run").exists()
    begin(of(tmp_path))
    folder.check_folder(of(tmp_path), resume=True)
    folder.check_folder(of(tmp_path, name="other", train={"keep": 5, "eval_batch_size": 1}), resume=True)
    with pytest.raises(RecipeError, match="holds this run already"):
        folder.check_folder(of(tmp_path), resume=False)
    with pytest.raises(RecipeError, match=r"method.rank was 8, is 2"):
        folder.check_folder(of(tmp_path, method={"name": "lora", "rank": 2}), resume=True)
    with pytest.raises(RecipeError, match="another recipe"):
        folder.check_folder(of(tmp_path, method=["lora", "bitfit"]), resume=True)


def test_a_damaged_recipe_in_the_folder_is_refused(tmp_path):
    begin(of(tmp_path))
    (tmp_path / "run" / "recipe.yaml").write_text("model: [\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        folder.check_folder(of(tmp_path), resume=True)


@pytest.mark.parametrize(("make", "said"), [
    (lambda p: None, "no such folder"), (lambda p: p.mkdir(), "not the folder of a run"),
    (lambda p: (p.mkdir(), (p / "delta.json").write_text("{}")), "the folder of a delta"),
    (lambda p: p.write_text("x"), "a file, not"),
    (lambda p: (p.mkdir(), (p / "recipe.yaml").write_text("")), "not finished")])
def test_what_is_no_run_is_told_apart(tmp_path, make, said):
    make(tmp_path / "it")
    with pytest.raises(RecipeError, match=said):
        folder.open_run(tmp_path / "it")


def test_of_a_part_of_a_run_the_run_is_named(tmp_path):
    begin(of(tmp_path))
    (tmp_path / "run" / "model").mkdir()
    for part in ("model", "recipe.yaml"):
        with pytest.raises(RecipeError, match=f"The run is {tmp_path / 'run'}"):
            folder.open_run(tmp_path / "run" / part)


def test_runs_beside_a_misspelt_one_are_named(tmp_path):
    begin(of(tmp_path, output=str(tmp_path / "reviews")))
    with pytest.raises(RecipeError, match="Did you mean 'reviews'"):
        folder.open_run(tmp_path / "review")
