"""prepare for images: what is drawn, what is decoded, what is left out, and what is said of it."""
import numpy as np
import pytest
import torch
from image_toys import class_folders, pixels, save, spec
from PIL import Image
from pydantic import ValidationError

from slimtune.data import DataSpec, imagerows, prepare
from slimtune.data.transform import transform_of
from slimtune.errors import DataError
from slimtune.io.images import ImageInput


def prepared(made: DataSpec):
    return prepare(made, transform_of(made, ImageInput(edge=made.size, positions=made.size)))


def test_rows_labels_and_batches(tmp_path):
    class_folders(tmp_path)
    data = prepared(spec(train=str(tmp_path), test=str(tmp_path), size=12))
    assert data.label_names == ("cat", "dog")
    assert (data.problem, data.num_labels, len(data.train), data.validation) == (
        "single_label_classification", 2, 6, None)
    batch = data.collate([data.train[0], data.test[5]])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"].dtype == torch.float32
    assert set(batch) == {"pixel_values", "labels"}
    byte = data.train[0]["pixel_values"]
    expected = np.asarray(Image.fromarray(pixels(0)).resize((12, 12), Image.Resampling.BICUBIC))
    assert np.array_equal(byte.numpy().transpose(1, 2, 0), expected)
    assert data.images["normalize"] == "imagenet"
    assert data.images["left_out"] == {}


def test_images_that_do_not_fit_into_memory_are_decoded_when_they_are_read(tmp_path, monkeypatch):
    class_folders(tmp_path, each=5)
    made = spec(train=str(tmp_path), augment=("flip", "crop"))
    kept = prepared(made).train
    monkeypatch.setattr(imagerows, "MEMORY", 1000)
    lazy = prepared(made).train
    assert kept.rows.kept is not None
    assert lazy.rows.kept is None
    for epoch in (0, 1):
        for one in (kept, lazy):
            one.set_epoch(epoch)
        together = lazy.__getitems__(range(10))
        assert all(torch.equal(kept[i]["pixel_values"], together[i]["pixel_values"]) for i in range(10))
    assert not torch.equal(torch.stack([row["pixel_values"] for row in kept.plain(4)]),
                           torch.stack([kept[i]["pixel_values"] for i in range(4)]))
    assert len(kept.plain(4)) == 4


def test_corrupt_images_are_refused_by_name_or_left_out(tmp_path, caplog):
    class_folders(tmp_path, each=8)
    whole = (tmp_path / "cat/0.png").read_bytes()
    (tmp_path / "cat/0.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "dog/7.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        prepared(spec(train=str(tmp_path)))
    said = str(caught.value)
    assert "2 of 16 images cannot be decoded" in said
    assert "cat/0.png: is damaged" in said
    assert "dog/7.png: the file is empty" in said
    assert said.endswith("data.corrupt=skip")
    data = prepared(spec(train=str(tmp_path), corrupt="skip"))
    assert len(data.train) == 14
    assert [data.train[i]["labels"] for i in (0, 6, 7)] == [0, 0, 1]
    first, second = data.images["left_out"]["train"]
    assert "/cat/0.png: is damaged" in first
    assert second.endswith("/dog/7.png: the file is empty")
    assert "2 of 16 images cannot be decoded and are left out" in caplog.text
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="none of its 16 images can be decoded"):
        prepared(spec(train=str(tmp_path), corrupt="skip"))


def test_what_is_drawn(tmp_path):
    class_folders(tmp_path, ("a", "b", "c"), each=10)
    made = spec(train=str(tmp_path), test_fraction=0.2, train_size=12, test_size=3, validation_fraction=0.25)
    data = prepared(made)
    names = {split: [p.name for p in getattr(data, split).rows.pictures] for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in names.items()} == {"train": 9, "validation": 3, "test": 3}
    assert len({name for found in names.values() for name in found}) == 15
    for split, each in (("train", 3), ("validation", 1), ("test", 1)):
        labels = [row["labels"] for row in getattr(data, split).rows]
        assert sorted(labels) == sorted([0, 1, 2] * each)
    again = prepared(made)
    assert [p.name for p in again.train.rows.pictures] == names["train"]
    other = prepared(made.model_copy(update={"seed": 1}))
    assert [p.name for p in other.train.rows.pictures] != names["train"]
    few = prepared(spec(train=str(tmp_path), shots=2))
    assert sorted(row["labels"] for row in few.train.rows) == [0, 0, 1, 1, 2, 2]


def test_digits_are_packaged():
    data = prepared(spec(dataset="digits", train_size=100, test_size=50))
    assert data.label_names == tuple("0123456789")
    assert (len(data.train), len(data.test)) == (100, 50)
    assert data.train[0]["pixel_values"].shape == (3, 8, 8)
    assert int(max(row["pixel_values"].max() for row in data.train.rows)) == 255
    with pytest.raises(DataError, match=r"digits: no split 'valid'.\n  It has: train test"):
        prepared(spec(train="digits:valid"))


def test_labels_that_train_does_not_have(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test", ("cat", "mouse"))
    with pytest.raises(DataError, match="label 'mouse' is not among the labels of train"):
        prepared(spec(train=str(tmp_path / "train"), test=str(tmp_path / "test")))
    save(tmp_path / "one/cat/0.png", 0)
    with pytest.raises(DataError, match="every row has the label 'cat'"):
        prepared(spec(train=str(tmp_path / "one")))


def test_texts_and_images_are_not_mixed_up(tmp_path):
    class_folders(tmp_path)
    made = spec(train=str(tmp_path))
    with pytest.raises(DataError, match="does not read with a NoneType"):
        prepare(made, None)
    text = DataSpec(task="classification", dataset="digits")
    with pytest.raises(DataError, match="does not read with a Transform"):
        prepare(text, transform_of(made, ImageInput()))


@pytest.mark.parametrize(("values", "said"), [
    ({"train": "x", "train_size": 9, "limit": 9}, "give one"), ({"train": "x", "shots": 9, "limit": 9}, "give one"),
    ({"layout": "vtab"}, "layout needs path"), ({"train": "x", "stage": "choose"}, "stage is of a layout"),
    ({"layout": "vtab", "path": "p", "train": "x"}, "leave out train"), ({"path": "p"}, "there is nothing to read"),
    ({"train": "x", "augment": ("flip", "flip")}, "augment names something twice"),
    ({"task": "classification", "train": "x", "size": 9}, "size is for image_classification, not for classification"),
    ({"task": "seq2seq", "train": "x", "train_size": 9}, "train_size draws by class")])
def test_specs_that_contradict_themselves(values, said):
    with pytest.raises(ValidationError, match=said):
        DataSpec(**{"task": "image_classification", **values})
