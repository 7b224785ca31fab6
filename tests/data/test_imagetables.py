"""Where images are read from: folders, archives, arrays, lists and tables; and what is said when they are not there."""
import csv
import gzip
import math
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_toys import class_folders, pixels, save, spec

from slimtune.data.imagetables import pictures, read_idx, read_images, split_line
from slimtune.data.picture import decode
from slimtune.data.tables import Table
from slimtune.errors import DataError

CAT, DOG = [0, 1, 2], [100, 101, 102]


def check(table, labels, seeds=(*CAT, *DOG)):
    assert table.columns["label"] == labels
    for picture, seed in zip(table.columns["image"], seeds, strict=True):
        assert np.array_equal(np.asarray(decode(picture)), pixels(seed))


def test_class_folders(tmp_path):
    class_folders(tmp_path / "train")
    save(tmp_path / "train/cat/deeper/0.PNG", 7)
    (tmp_path / "train/cat/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/.hidden").mkdir()
    save(tmp_path / "train/.hidden/0.png", 9)
    table = read_images(str(tmp_path / "train"), spec(train="x"))
    check(table, ["cat"] * 4 + ["dog"] * 3, (*CAT, 7, *DOG))
    assert table.columns["image"][0].name == "train/cat/0.png"


def test_paths_are_taken_from_data_path(tmp_path):
    class_folders(tmp_path / "train")
    check(read_images("train", spec(train="train", path=str(tmp_path))), ["cat"] * 3 + ["dog"] * 3)


@pytest.mark.parametrize("around", ["", "Dataset/", "a/b/"])
def test_zip(tmp_path, around):
    root = class_folders(tmp_path / "train")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as out:
        for path in sorted(root.rglob("*.png")):
            out.write(path, around + path.relative_to(root).as_posix())
        out.writestr("__MACOSX/cat/._0.png", b"x")
        out.writestr(around + "cat/notes.txt", b"x")
    table = read_images(str(tmp_path / "t.zip"), spec(train="x"))
    check(table, ["cat"] * 3 + ["dog"] * 3)
    assert table.columns["image"][0].name == f"t.zip@{around}cat/0.png"


@pytest.mark.parametrize(("names", "split", "options"), [
    (("train_images", "train_labels"), "train", {}), (("val_images", "val_labels"), "validation", {}),
    (("x_test", "y_test"), "test", {}), (("images", "labels"), "test", {}),
    (("scans", "kind"), "train", {"image": "scans", "label": "kind"})])
def test_npz(tmp_path, names, split, options):
    arrays = np.stack([pixels(i) for i in range(4)])
    np.savez(tmp_path / "a.npz", **{names[0]: arrays, names[1]: np.array([[1], [0], [1], [2]])})
    made = spec(train="x", **options)
    table = read_images(str(tmp_path / "a.npz"), made, split)
    assert table.columns[made.label] == [1, 0, 1, 2]
    assert np.array_equal(np.asarray(decode(table.columns[made.image][3])), arrays[3])


def test_npz_with_channels_first_and_one_channel(tmp_path):
    arrays = np.stack([pixels(i) for i in range(2)])
    np.savez(tmp_path / "a.npz", images=arrays.transpose(0, 3, 1, 2), labels=[0, 1])
    first = read_images(str(tmp_path / "a.npz"), spec(train="x")).columns["image"][0]
    assert np.array_equal(np.asarray(decode(first)), arrays[0])
    np.savez(tmp_path / "b.npz", images=arrays[..., :1], labels=[0, 1])
    grey = np.asarray(decode(read_images(str(tmp_path / "b.npz"), spec(train="x")).columns["image"][0]))
    assert np.array_equal(grey, np.repeat(arrays[0, ..., :1], 3, axis=2))


def write_idx(path, array, pack=True):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if pack else raw)


@pytest.mark.parametrize("pack", [True, False])
def test_idx(tmp_path, pack):
    scans = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    end = ".gz" if pack else ""
    write_idx(tmp_path / f"train-images-idx3-ubyte{end}", scans, pack)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.array([3, 1, 3, 0], np.uint8), pack)
    table = read_images(str(tmp_path / f"train-images-idx3-ubyte{end}"), spec(train="x"))
    assert table.columns["label"] == [3, 1, 3, 0]
    assert np.array_equal(np.asarray(decode(table.columns["image"][2]))[..., 0], scans[2])


def test_list(tmp_path):
    save(tmp_path / "images/my cat.png", 0)
    save(tmp_path / "images/b.png", 1)
    (tmp_path / "train.txt").write_text("images/my cat.png 4\n\nimages/b.png\t 0 \n")
    table = read_images(str(tmp_path / "train.txt"), spec(train="x"))
    check(table, ["4", "0"], (0, 1))
    assert table.place(1).endswith("train.txt, line 3")
    without = read_images(str(tmp_path / "train.txt"), spec(train="x"), labelled=False)
    assert [p.name for p in without.columns["image"]] == ["images/my cat.png", "images/b.png"]


def test_tables_with_a_column_of_paths_or_bytes(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(3)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *((p.name, "x") for p in paths)])
    table = read_images(str(tmp_path / "a.csv"), spec(train="x", image="file"))
    assert [np.array_equal(np.asarray(decode(p)), pixels(i)) for i, p in enumerate(table.columns["file"])] == [True] * 3
    pa = pytest.importorskip("pyarrow", reason="slimtune[parquet] is not installed")
    import pyarrow.parquet as pq
    for column in ([p.read_bytes() for p in paths], [{"bytes": p.read_bytes(), "path": None} for p in paths]):
        pq.write_table(pa.table({"image": column, "label": [0, 1, 1]}), tmp_path / "a.parquet")
        check(read_images(str(tmp_path / "a.parquet"), spec(train="x")), [0, 1, 1], (0, 1, 2))


def test_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="slimtune[datasets] is not installed")
    from slimtune.data.splits import read_splits

    class_folders(tmp_path / "cats/train")
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "cats"), cache_dir=str(tmp_path / "cache"))
    data.save_to_disk(str(tmp_path / "saved"))
    splits = read_splits(spec(dataset=str(tmp_path / "saved"), source="datasets"))
    check(splits.train, ["cat"] * 3 + ["dog"] * 3)


words = st.text(st.characters(blacklist_categories=("Z", "C")), min_size=1)


@given(st.lists(words, min_size=1).map(" ".join), words)
def test_any_line_of_a_path_and_a_label_is_split(path, label):
    assert split_line(f" {path} \t{label} ", "x") == (path, label)


@given(words)
def test_a_line_of_one_word_is_refused(word):
    with pytest.raises(DataError, match="one word"):
        split_line(f" {word}  ", "a.txt, line 3")


@given(st.binary(max_size=40) | st.binary(max_size=9).map(lambda b: b"\0\0\x08\1\0\0\0\5" + b))
def test_no_bytes_crash_the_reader_of_idx(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("idx") / "x-ubyte"
    path.write_bytes(raw)
    good = raw[:3] == b"\0\0\x08" and len(raw) > 3 and len(raw) >= 4 + 4 * raw[3] and (
        math.prod(struct.unpack_from(f">{raw[3]}I", raw, 4)) == len(raw) - 4 - 4 * raw[3])
    if good:
        assert read_idx(path).dtype == np.uint8
    else:
        with pytest.raises(DataError, match="x-ubyte"):
            read_idx(path)


def refused(given, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_images(str(given), spec(train="x", **options))
    return str(caught.value)


def test_what_is_not_there(tmp_path):
    class_folders(tmp_path / "train")
    assert "no such file or folder.\n  The folder has: train" in refused(tmp_path / "trian")
    assert "does not exist either.\n  Set data.path" in refused(tmp_path / "a/b")
    (tmp_path / "x.h5").write_bytes(b"x")
    assert "no images are read from files of kind '.h5'" in refused(tmp_path / "x.h5")
    assert "files of kind '.png'" in refused(tmp_path / "train/cat/0.png")
    (tmp_path / "train/mouse").mkdir()
    assert "1 class folders hold no image: mouse" in refused(tmp_path / "train")
    save(tmp_path / "train/loose.png", 0)
    assert "1 images are in no class folder, such as loose.png" in refused(tmp_path / "train")
    (tmp_path / "empty").mkdir()
    assert "there are no images" in refused(tmp_path / "empty")


def test_bad_lists_and_tables(tmp_path):
    save(tmp_path / "a.png", 0)
    (tmp_path / "l.txt").write_text("a.png 0\nb.png 1\n")
    assert "l.txt, line 2: no such image: b.png" in refused(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("a.png 0\na.png\n")
    assert "l.txt, line 2: one word, 'a.png'" in refused(tmp_path / "l.txt")
    (tmp_path / "c.csv").write_text("path,label\na.png,0\n")
    assert "no column 'image' (data.image).\n  It has: path label" in refused(tmp_path / "c.csv")
    table = Table("t", {"image": [3]}, [7], "row")
    with pytest.raises(DataError, match="t, row 7: holds no image: '3'"):
        pictures(table, spec(train="x"), tmp_path)


def test_bad_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=pixels(0)[None])
    assert "It has: pictures" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels(0)[None] / 255, labels=[0])
    assert "bytes (uint8)" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels(0)[None], labels=[0, 1])
    assert "1 images, but 2 labels" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels(0)[None], labels=np.array(3))
    assert "labels of shape (); one an image" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels(0)[None], labels=np.array([{}], dtype=object))
    assert "not readable as .npz" in refused(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 no")
    assert "not readable as .npz" in refused(tmp_path / "b.npz")
    scans = np.zeros((2, 3, 3), np.uint8)
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", scans)
    assert "its file of labels is not beside it: t-labels-idx1-ubyte.gz" in refused(tmp_path / "t-images-idx3-ubyte.gz")
    whole = (tmp_path / "t-images-idx3-ubyte.gz").read_bytes()
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", np.array(3, np.uint8))
    assert "labels of shape (); one an image" in refused(tmp_path / "t-images-idx3-ubyte.gz")
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", np.zeros(2, np.uint8))
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    assert "not readable as gzip" in refused(tmp_path / "t-images-idx3-ubyte.gz")
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(gzip.decompress(whole)[:-3])
    assert "its header says 2 x 3 x 3, but 15 bytes follow" in refused(tmp_path / "t-images-idx3-ubyte.gz")
