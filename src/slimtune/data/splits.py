"""Splits: the tables of train, validation and test, the same in every process for a given seed."""
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimtune.data import digits, drugreview, elevater, fgvc, vtab
from slimtune.data.columns import label_column, label_sets
from slimtune.data.draw import balanced, few, few_of_sets, generator
from slimtune.data.imagetables import pictures, read_images
from slimtune.data.layout import Layout
from slimtune.data.spec import IMAGES, LABELLED, MULTI_LABEL, SPLITS, DataSpec
from slimtune.data.tables import Table, read_dataset, read_table
from slimtune.errors import DataError, listing, suggest

PACKAGED: dict[str, Callable[[str], Table]] = {"drugreview": drugreview.load, "digits": digits.load}
LAYOUTS: dict[str, Callable[[DataSpec], Layout]] = {"vtab": vtab.read, "fgvc": fgvc.read, "elevater": elevater.read}


@dataclass(frozen=True)
class Splits:
    """The tables of a run; a split that was not given is None.

    whole: train before anything took from it; what the label names are read from.
    names: the label names, where the set itself says them.
    """

    train: Table | None
    validation: Table | None
    test: Table | None
    whole: Table | None
    names: tuple[str, ...] = ()


def read_splits(spec: DataSpec) -> Splits:
    """Read every split, cut test off train if so asked, draw from them, and cut validation off when none is given.

    Errors: DataError, ExtraError.
    """
    names: tuple[str, ...] = ()
    fraction = spec.validation_fraction
    if spec.layout is not None:
        found = LAYOUTS[spec.layout](spec)
        names, fraction = found.names, found.held
        train, validation, test = found.train, found.validation, found.test
    else:
        train, validation, test = (_read(spec, split) for split in SPLITS)
    whole = train
    if train is not None and test is None and spec.test_fraction > 0:
        train, test = _cut(train, spec, spec.test_fraction, "test")
    train = None if train is None else _drawn(train, spec)
    if test is not None and spec.test_size is not None:
        test = test.take(balanced(label_column(test, spec.label), spec.test_size, spec.seed, "test_size"))
    if train is not None and validation is None and fraction > 0:
        train, validation = _cut(train, spec, fraction, "validation")
    return Splits(train, validation, test, whole, names)


def _drawn(train: Table, spec: DataSpec) -> Table:
    """What limit, train_size or shots leave of train."""
    if spec.limit is not None:
        order = list(range(len(train)))
        generator(spec.seed, "limit").shuffle(order)
        return train.take(order[:spec.limit])
    if spec.train_size is not None:
        return train.take(balanced(label_column(train, spec.label), spec.train_size, spec.seed, "train_size"))
    if spec.shots is not None and spec.task == MULTI_LABEL:
        return train.take(few_of_sets(label_sets(train, spec.label), spec.shots, spec.seed))
    if spec.shots is not None:
        return train.take(few(label_column(train, spec.label), spec.shots, spec.seed))
    return train


def _cut(train: Table, spec: DataSpec, fraction: float, purpose: str) -> tuple[Table, Table | None]:
    """What is kept and what is held out, in proportion to the labels if each has one; None where nothing can be."""
    classes = label_column(train, spec.label) if spec.task in LABELLED else None
    kept, held = hold_out(len(train), fraction, spec.seed, classes, purpose)
    return (train.take(kept), train.take(held)) if held else (train, None)


def hold_out(size: int, fraction: float, seed: int, classes: Sequence[Hashable] | None = None,
             purpose: str = "validation") -> tuple[list[int], list[int]]:
    """Rows kept and rows held out, each in ascending order.

    round(size fraction) rows are held out, at least one of two; of each class c within one row of
    n_c fraction, and never a class's last row.

    Example:
        >>> kept, held = hold_out(10, 0.2, seed=0, classes="aaaaabbbbb")
        >>> len(kept), len([i for i in held if i < 5])
        (8, 1)
    """
    groups: dict[Hashable, list[int]] = {}
    for row in range(size):
        groups.setdefault(classes[row] if classes is not None else None, []).append(row)
    wanted = max(round(size * fraction), 1) if fraction > 0 and size > 1 else 0
    quota = {name: min(int(len(rows) * fraction), len(rows) - 1) for name, rows in groups.items()}
    by_remainder = sorted(groups, key=lambda name: -(len(groups[name]) * fraction % 1))  # equal: first seen
    for name in by_remainder:
        if sum(quota.values()) < wanted and quota[name] < len(groups[name]) - 1:
            quota[name] += 1
    rng = generator(seed, purpose)
    held = sorted(row for name, rows in groups.items() for row in rng.sample(rows, quota[name]))
    out = set(held)
    return [row for row in range(size) if row not in out], held


def _read(spec: DataSpec, split: str) -> Table | None:
    """The table of a split, its images as pictures."""
    table = _table(spec, split)
    if table is None or spec.task not in IMAGES:
        return table
    return pictures(table, spec, Path())


def _table(spec: DataSpec, split: str) -> Table | None:
    """Packaged, of the `datasets` library, or a file."""
    given: str | None = getattr(spec, split)
    if spec.source == "datasets":
        name, part = _name_and_split(given, spec.dataset, split)
        return read_dataset(name, part) if name else None
    if spec.dataset is not None and spec.dataset not in PACKAGED:
        raise DataError(f"data.dataset: no packaged set '{spec.dataset}'.", f"There is: {listing(PACKAGED)}",
                        suggest(spec.dataset, PACKAGED) or "For a set of the `datasets` library set "
                        "data.source=datasets; files go in data.train, data.validation and data.test.")
    if spec.dataset is not None:
        part = given or {"train": "train", "test": "test"}.get(split)
        return PACKAGED[spec.dataset](part) if part else None
    if given is None:
        return None
    name, _, part = given.partition(":")
    if name in PACKAGED:
        return PACKAGED[name](part or split)
    return read_images(given, spec, split) if spec.task in IMAGES else read_table(given, spec)


def _name_and_split(given: str | None, dataset: str | None, split: str) -> tuple[str, str]:
    """Set and split of the `datasets` library; an empty name where the split was not asked for."""
    if dataset is not None:
        part = given or (split if split == "train" else "")
        return (dataset, part) if part else ("", "")
    if given is None:
        return "", ""
    name, colon, part = given.rpartition(":")
    return (name, part) if colon else (given, split)
