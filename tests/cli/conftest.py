"""Fixtures of the command line's tests."""
from pathlib import Path

import pytest
import yaml
from cli_toys import save_model, sentences, write_csv
from typer.testing import CliRunner, Result


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """A folder with tiny models (bert, gpt2, t5) and data: train.csv, test.csv."""
    home = tmp_path_factory.mktemp("shelf")
    for family in ("bert", "gpt2", "t5"):
        save_model(family, home / family)
    write_csv(home / "train.csv", sentences(64, 0))
    write_csv(home / "test.csv", sentences(24, 1))
    return home


@pytest.fixture
def recipe(shelf, tmp_path):
    """Write a recipe of the tiny bert; keywords replace its nodes."""

    def write(**nodes) -> Path:
        tree = {"model": str(shelf / "bert"), "method": {"name": "lora", "rank": 4, "dropout": 0.1},
                "data": {"task": "classification", "train": str(shelf / "train.csv"), "test": str(shelf / "test.csv"),
                         "max_length": 16},
                "train": {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "threads": 1},
                "output": str(tmp_path / "run")}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(tree | nodes))
        return path

    return write


@pytest.fixture
def cli():
    """Run a verb in this process."""
    from slimtune.cli.main import app

    def invoke(*arguments, **options) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="slimtune", **options)
        assert "Traceback" not in result.output
        return result

    return invoke
