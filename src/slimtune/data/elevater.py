"""ELEVATER's image classification sets: index files beside stored .zip archives, as its toolkit lays them out.

A set's folder holds an index for each split, either text (`train.zip@1.jpg 3` a line, class names in `labels.txt`)
or COCO's JSON (images, annotations, categories), and the archives that they name. Settings are chosen on a fifth of
the few-shot training data; the final run trains on all of it. Scores are accuracy; class_accuracy for Caltech-101,
Aircraft, Flowers and Pets; roc_auc for Hateful Memes; map_11 for VOC 2007, whose images have several labels
(`train.zip@1.jpg 3,7` a line) and which is a multi_label_image_classification.
Source: Li et al., 2022, "ELEVATER: A Benchmark and Toolkit for Evaluating Language-Augmented Visual Models",
arXiv 2204.08790.
"""
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.data.imagetables import make_table, read_list
from slimtune.data.layout import Layout, home_of
from slimtune.data.picture import exists, picture_at
from slimtune.data.spec import MULTI_LABEL, DataSpec
from slimtune.data.tables import Table, read_text
from slimtune.errors import DataError, listing, suggest

INDEX = {"train": ("train.txt", "train_images.txt", "train.json", "train_meta.json"),
         "test": ("test.txt", "test_images.txt", "test.json", "test_meta.json")}
HELD = 0.2


@dataclass(frozen=True)
class Task:
    """Classes, and the figure of `metrics` that counts."""

    classes: int
    metric: str = "accuracy"


TASKS = {
    "caltech101": Task(102, "class_accuracy"), "cifar10": Task(10), "cifar100": Task(100), "country211": Task(211),
    "dtd": Task(47), "eurosat": Task(10), "fer2013": Task(7), "fgvc_aircraft": Task(100, "class_accuracy"),
    "food101": Task(101), "gtsrb": Task(43), "hateful_memes": Task(2, "roc_auc"), "kitti_distance": Task(4),
    "mnist": Task(10), "oxford_flowers102": Task(102, "class_accuracy"), "oxford_iiit_pet": Task(37, "class_accuracy"),
    "patch_camelyon": Task(2), "rendered_sst2": Task(2), "resisc45": Task(45), "stanford_cars": Task(196),
    "voc2007": Task(20, "map_11"),
}


def average(scores: Mapping[str, float]) -> float:
    """The mean over the 20 sets, each by its own figure. Errors: DataError naming sets that are missing or not known.

    Example:
        >>> average({name: 0.5 for name in TASKS})
        0.5
    """
    other, missing = [n for n in scores if n not in TASKS], [n for n in TASKS if n not in scores]
    if other or missing:
        raise DataError(f"ELEVATER has {len(TASKS)} sets; not among them: {listing(other) or 'none'}; "
                        f"missing: {listing(missing) or 'none'}", suggest(other[0], TASKS) if other else "")
    return sum(scores.values()) / len(scores)


def read(spec: DataSpec) -> Layout:
    """train, cut by data.shots, of which choose holds out a fifth; test in the final run alone.

    Errors: DataError naming the file and line, and for indices with several labels an image where each has one class.
    """
    home = home_of(spec, INDEX["train"], "ELEVATER")
    names, train = _split(home, "train", spec)
    if spec.stage == "choose":
        return Layout(train, None, None, names, HELD)
    return Layout(train, None, _split(home, "test", spec)[1], names)


def _split(home: Path, split: str, spec: DataSpec) -> tuple[tuple[str, ...], Table]:
    path = next((home / name for name in INDEX[split] if (home / name).is_file()), None)
    if path is None:
        raise DataError(f"{home}: has no index of {split}.", f"Its name is one of: {listing(INDEX[split])}")
    return _coco(path, spec) if path.suffix == ".json" else _text(path, spec)


def _text(path: Path, spec: DataSpec) -> tuple[tuple[str, ...], Table]:
    files = [path.with_name(name) for name in ("labels.txt", "labelmap.txt")]
    named = next((file for file in files if file.is_file()), None)
    if named is None:
        raise DataError(f"{path.parent}: has no labels.txt with the names of the classes, one a line.")
    names = tuple(line.strip() for line in read_text(named, "utf-8").splitlines() if line.strip())
    table = read_list(path, spec, path.parent)
    labels: list[Any] = []
    for row, given in enumerate(table.columns[spec.label]):
        numbers = given.split(",") if spec.task == MULTI_LABEL else [given]
        for number in numbers:
            if not number.isdecimal():
                raise _not_one(table.place(row), given)
            if int(number) >= len(names):
                raise DataError(f"{table.place(row)}: class {number}, but {named.name} names {len(names)} from 0.")
        found = [names[int(number)] for number in numbers]
        labels.append(found if spec.task == MULTI_LABEL else found[0])
    return _once(names, named), Table(table.name, {**table.columns, spec.label: labels}, table.numbers, table.unit)


def _coco(path: Path, spec: DataSpec) -> tuple[tuple[str, ...], Table]:
    try:
        tree: Any = json.loads(read_text(path, "utf-8"))
        names = {one["id"]: str(one["name"]).strip() for one in sorted(tree["categories"], key=lambda c: c["id"])}
        given: dict[Any, list[Any]] = {}
        for one in tree["annotations"]:
            given.setdefault(one["image_id"], []).append(one["category_id"])
        images = [(str(one["file_name"]), given.get(one["id"], [])) for one in tree["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not COCO's JSON of images, annotations and categories: {error!r}.") from None
    for i, (name, classes) in enumerate(images):
        if (len(classes) != 1 and spec.task != MULTI_LABEL) or any(c not in names for c in classes):
            raise _not_one(f"{path}, image {i + 1} ({name})", listing(map(str, classes)) or "none")
    found = [picture_at(path.parent, name) for name, _ in images]
    lost = next((picture for picture in found if not exists(picture)), None)
    if lost is not None:
        raise DataError(f"{path}: no such image: {lost.name}.", f"It was looked for at {lost.path}")
    labels = [[names[c] for c in classes] for _, classes in images]
    return _once(tuple(names.values()), path), make_table(
        str(path), found, labels if spec.task == MULTI_LABEL else [own[0] for own in labels], spec)


def _once(names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: classes named twice: {listing(twice, 8)}", "Every class needs a name of its own.")
    return names


def _not_one(place: str, labels: str) -> DataError:
    return DataError(f"{place}: its labels are {labels}; one class number is expected.",
                     f"For a set with several labels an image, as VOC 2007, set data.task={MULTI_LABEL}: numbers with "
                     "commas between them.")
