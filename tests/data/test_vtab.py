"""VTAB-1k: its split lists, what each stage may read, and its averages on VPT's published rows."""
import pytest
from image_toys import save, spec

from slimtune.data import prepare, vtab
from slimtune.data.splits import read_splits
from slimtune.data.transform import transform_of
from slimtune.errors import DataError
from slimtune.io.images import ImageInput

# Jia et al., 2022, table 1 and its per-task table, ViT-B/16; order of vtab.TASKS. Averages: groups, their mean, plain.
PUBLISHED = {
    "full": ("68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1",
             (75.88, 83.36, 47.64, 68.97, 65.57)),
    "linear": ("63.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.6 74.0 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2",
               (68.93, 77.16, 26.84, 57.64, 52.94)),
    "bias": ("72.8 87.0 59.2 97.5 85.3 59.9 51.4 78.7 91.6 72.9 69.8 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1",
             (73.30, 78.25, 44.09, 65.22, 62.05)),
    "shallow": ("77.7 86.9 62.6 97.5 87.3 74.5 51.2 78.2 92.0 75.6 72.9 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1",
                (76.81, 79.66, 46.98, 67.82, 64.85)),
    "deep": ("78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8",
             (78.48, 82.43, 54.98, 71.97, 69.43)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_averages_of_published_rows(name):
    row, expected = PUBLISHED[name]
    found = vtab.averages(dict(zip(vtab.TASKS, map(float, row.split()), strict=True)))
    assert tuple(found) == (*vtab.GROUPS, "mean_of_groups", "mean")
    groups, means = list(found.values())[:3], list(found.values())[3:]
    assert groups == pytest.approx(expected[:3], abs=0.05)    # printed from scores that the rows round to 0.1
    assert means == pytest.approx(expected[3:], abs=0.0051)   # of the rows themselves


def test_the_tasks():
    assert sum(task.classes for task in vtab.TASKS.values()) == 940
    assert [sum(task.group == group for task in vtab.TASKS.values()) for group in vtab.GROUPS] == [7, 4, 8]
    scores = {name: 1.0 for name in vtab.TASKS if name != "svhn"}
    with pytest.raises(DataError, match="not among them: none; missing: svhn"):
        vtab.averages(scores)
    with pytest.raises(DataError, match=r"not among them: cifa; missing: svhn\n  Did you mean 'cifar'"):
        vtab.averages(scores | {"cifa": 1.0})


@pytest.fixture
def home(tmp_path):
    """10 images of classes 0 to 2; 8 to train on, of which 2 are to choose by, and 2 to test on."""
    for i in range(10):
        save(tmp_path / f"set/images/{i}.png", i)
    lists = {"train800.txt": range(6), "val200.txt": (6, 7), "train800val200.txt": range(8), "test.txt": (8, 9)}
    for name, rows in lists.items():
        (tmp_path / "set" / name).write_text("".join(f"images/{i}.png {i % 3}\n" for i in rows))
    return tmp_path / "set"


def names(table):
    return [p.name for p in table.columns["image"]]


def test_choose_never_reads_test_and_final_trains_on_all(home):
    (home / "test.txt").rename(home / "hidden")
    splits = read_splits(spec(layout="vtab", path=str(home), stage="choose", validation_fraction=0.1))
    assert names(splits.train) == [f"images/{i}.png" for i in range(6)]
    assert names(splits.validation) == ["images/6.png", "images/7.png"]
    assert splits.test is None
    with pytest.raises(DataError, match=r"test.txt: no such file, which data.stage=final needs"):
        read_splits(spec(layout="vtab", path=str(home)))
    (home / "hidden").rename(home / "test.txt")
    splits = read_splits(spec(layout="vtab", path=str(home), validation_fraction=0.1))
    assert len(splits.train) == 8
    assert splits.validation is None
    assert names(splits.test) == ["images/8.png", "images/9.png"]


def test_a_known_set_has_all_its_classes(home):
    made = spec(layout="vtab", path=str(home))
    assert prepare(made, transform_of(made, ImageInput())).label_names == ("0", "1", "2")
    for name, classes in (("kitti", 4), ("svhn", 10)):
        home = home.rename(home.with_name(name))
        splits = read_splits(spec(layout="vtab", path=str(home)))
        assert splits.names == tuple(map(str, range(classes)))
    home = home.rename(home.with_name("patch_camelyon"))
    with pytest.raises(DataError, match="has a class 2, but patch_camelyon has 2 classes"):
        read_splits(spec(layout="vtab", path=str(home)))


def test_bad_folders(home, tmp_path):
    with pytest.raises(DataError, match=r"not a VTAB-1k set.*\n.*\n  Sets inside it: set"):
        read_splits(spec(layout="vtab", path=str(tmp_path)))
    with pytest.raises(DataError, match="no such folder"):
        read_splits(spec(layout="vtab", path=str(tmp_path / "no")))
    (home / "test.txt").write_text("images/8.png cat\n")
    with pytest.raises(DataError, match=r"test\.txt, line 1: the label 'cat' is not a class number"):
        read_splits(spec(layout="vtab", path=str(home)))
