"""Tiny models in folders, with tokenizers, and a set of labelled texts that they can learn."""
import csv
import random
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

WORDS = {"good": ["good", "fine", "great", "lovely"], "bad": ["bad", "poor", "awful", "dreadful"]}
FILLERS = ["the", "film", "was", "a", "story", "and", "an", "actor", "scene", "with", "it", "for"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_model(family: str, folder: Path) -> Path:
    """A tiny model of a family with a tokenizer of whole words, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from slimtune.testing import tiny

    words = [*SPECIAL, *FILLERS, *WORDS["good"], *WORDS["bad"]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if family == "bert":
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    if family != "bert":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    ids = {"pad_token_id": 0, "initializer_range": 0.1} if family == "bert" else {"pad_token_id": 0, "eos_token_id": 3}
    tiny(family, dropout=True, **ids).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = ("good", "bad")[i % 2]
        words = rng.choices(FILLERS, k=rng.randint(1, 4)) + rng.choices(WORDS[label], k=4)
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


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
