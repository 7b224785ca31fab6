"""VTAB-1k: 19 sets of 1,000 training images in three groups; its split lists, its protocol and its two averages.

A set is a folder with `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`, lines of `images/x.jpg 3`:
the layout in which the sets are passed on. To choose settings one trains on 800 and scores on 200; the final run
trains on all 1,000 and is scored on test after its last epoch.
Source: Zhai et al., 2019, "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark",
arXiv 1910.04867; layout: Zhang et al., 2022, "Neural Prompt Search", arXiv 2206.04673.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slimtune.data.columns import label_column
from slimtune.data.imagetables import read_list
from slimtune.data.layout import Layout, home_of
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.errors import DataError, listing, suggest

LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")


@dataclass(frozen=True)
class Task:
    """A set of VTAB-1k: its group, classes and test images."""

    group: str
    classes: int
    test: int


TASKS = {
    "cifar": Task("natural", 100, 10000), "caltech101": Task("natural", 102, 6084), "dtd": Task("natural", 47, 1880),
    "oxford_flowers102": Task("natural", 102, 6149), "oxford_iiit_pet": Task("natural", 37, 3669),
    "svhn": Task("natural", 10, 26032), "sun397": Task("natural", 397, 21750),
    "patch_camelyon": Task("specialized", 2, 32768), "eurosat": Task("specialized", 10, 5400),
    "resisc45": Task("specialized", 45, 6300), "diabetic_retinopathy": Task("specialized", 5, 42670),
    "clevr_count": Task("structured", 8, 15000), "clevr_dist": Task("structured", 6, 15000),
    "dmlab": Task("structured", 6, 22735), "kitti": Task("structured", 4, 711),
    "dsprites_loc": Task("structured", 16, 73728), "dsprites_ori": Task("structured", 16, 73728),
    "smallnorb_azi": Task("structured", 18, 12150), "smallnorb_ele": Task("structured", 9, 12150),
}
"""In the order of the papers' tables."""
GROUPS = ("natural", "specialized", "structured")


def read(spec: DataSpec) -> Layout:
    """choose: train800 and val200, test is not read. final: train800val200 and test.

    A folder with the name of a set has its classes, 0 to K - 1, though a list may lack some; another has those of its
    lists. Errors: DataError naming the file and line.
    """
    home = home_of(spec, LISTS, "VTAB-1k")
    names = ("train800.txt", "val200.txt") if spec.stage == "choose" else ("train800val200.txt", "test.txt")
    missing = [name for name in names if not (home / name).is_file()]
    if missing:
        raise DataError(f"{home / missing[0]}: no such file, which data.stage={spec.stage} needs.",
                        f"The layout has: {listing(LISTS)}")
    train, judged = (read_list(home / name, spec, home) for name in names)
    classes = _classes(home, spec, (train, judged))
    validation, test = (judged, None) if spec.stage == "choose" else (None, judged)
    return Layout(train, validation, test, tuple(map(str, range(classes))))


def _classes(home: Path, spec: DataSpec, tables: tuple[Table, ...]) -> int:
    most = 0
    for table in tables:
        for row, label in enumerate(label_column(table, spec.label)):
            if not label.isdecimal():
                raise DataError(f"{table.place(row)}: the label '{label}' is not a class number.",
                                "A line is a path and a number: images/0001.jpg 3")
            most = max(most, int(label) + 1)
    known = TASKS.get(home.resolve().name)
    if known is not None and most > known.classes:
        raise DataError(f"{home}: has a class {most - 1}, but {home.resolve().name} has {known.classes} classes.",
                        "Is the folder's name right? Classes are counted from 0.")
    return known.classes if known else most


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The means of the groups, their mean, and the plain mean of the 19 tasks: papers print one or the other.

    scores: of all 19 tasks, by name. Errors: DataError naming what is missing or unknown.

    Example:
        >>> found = averages(dict.fromkeys(TASKS, 0.5) | {"svhn": 1.0})
        >>> round(found["mean_of_groups"], 3), round(found["mean"], 3)
        (0.524, 0.526)
    """
    unknown = [name for name in scores if name not in TASKS]
    missing = [name for name in TASKS if name not in scores]
    if unknown or missing:
        raise DataError(f"VTAB-1k's averages are of its 19 tasks; not among them: {listing(unknown) or 'none'}; "
                        f"missing: {listing(missing) or 'none'}", suggest(unknown[0], TASKS) if unknown else "")
    groups = {group: _mean([scores[name] for name, task in TASKS.items() if task.group == group]) for group in GROUPS}
    return groups | {"mean_of_groups": _mean(list(groups.values())), "mean": _mean(list(scores.values()))}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
