"""FGVC: the split files of VPT, in each set's image folder."""
import json

import pytest
from image_toys import save, spec

from slimtune.data.splits import read_splits
from slimtune.errors import DataError


@pytest.fixture
def home(tmp_path):
    for i in range(6):
        save(tmp_path / f"images/{i % 2}/{i}.png", i)
    for name, rows in {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({f"{i % 2}/{i}.png": 7 + i % 2 for i in rows}))
    return tmp_path


@pytest.mark.parametrize("folder", ["images", "Images", "."])
def test_its_splits(home, folder):
    if folder == ".":
        for i in (0, 1):
            (home / f"images/{i}").rename(home / str(i))
    elif folder == "Images":
        (home / "images").rename(home / "Images")
    splits = read_splits(spec(layout="fgvc", path=str(home)))
    assert [len(t) for t in (splits.train, splits.validation, splits.test)] == [3, 1, 2]
    assert splits.names == ("7", "8")
    assert splits.test.columns["label"] == [7, 8]
    assert splits.test.columns["image"][0].name == "0/4.png"


def test_choose_never_reads_test(home):
    (home / "test.json").unlink()
    assert read_splits(spec(layout="fgvc", path=str(home), stage="choose")).test is None
    with pytest.raises(DataError, match=r"test.json: no such file"):
        read_splits(spec(layout="fgvc", path=str(home)))


@pytest.mark.parametrize(("text", "said"), [
    ("[1]", "not an object of file names"), ('{"a": "x"}', "not an object of file names"), ("{", "not JSON"),
    ('{"0/0.png": 7, "0/9.png": 7}', r"no such image: 0/9.png, entry 2"), ("{}", "there are no images")])
def test_bad_files(home, text, said):
    (home / "train.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_splits(spec(layout="fgvc", path=str(home)))
