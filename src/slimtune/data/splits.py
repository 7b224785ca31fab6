"""Splits: the tables of train, validation and test, the same in every process for a given seed."""
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from slimtune.data import drugreview
from slimtune.data.columns import label_column
from slimtune.data.spec import SPLITS, DataSpec
from slimtune.data.tables import Table, read_dataset, read_table
from slimtune.errors import DataError, listing, suggest

PACKAGED: dict[str, Callable[[str], Table]] = {"drugreview": drugreview.load}


@dataclass(frozen=True)
class Splits:
    """The tables of a run; a split that was not given is None.

    whole: train before `limit` and validation took from it; what the label names are read from.
    """

    train: Table | None
    validation: Table | None
    test: Table | None
    whole: Table | None


def read_splits(spec: DataSpec) -> Splits:
    """Read every split, apply `limit`, and cut validation off train when none is given.

    Errors: DataError, ExtraError.
    """
    train, validation, test = (_read(spec, split) for split in SPLITS)
    whole = train
    if train is not None and spec.limit is not None:
        order = list(range(len(train)))
        _rng(spec.seed, "limit").shuffle(order)
        train = train.take(order[:spec.limit])
    if train is not None and validation is None and spec.validation_fraction > 0:
        classes = label_column(train, spec.label) if spec.task == "classification" else None
        kept, held = hold_out(len(train), spec.validation_fraction, spec.seed, classes)
        if held:
            train, validation = train.take(kept), train.take(held)
    return Splits(train, validation, test, whole)


def hold_out(size: int, fraction: float, seed: int,
             classes: Sequence[Hashable] | None = None) -> tuple[list[int], list[int]]:
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
    rng = _rng(seed, "validation")
    held = sorted(row for name, rows in groups.items() for row in rng.sample(rows, quota[name]))
    out = set(held)
    return [row for row in range(size) if row not in out], held


def _rng(seed: int, purpose: str) -> random.Random:
    """Seeded by text, which `random` hashes with SHA-512: the same in any process."""
    return random.Random(f"slimtune/{purpose}/{seed}")


def _read(spec: DataSpec, split: str) -> Table | None:
    """The table of a split: packaged, of the `datasets` library, or a file."""
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
    return PACKAGED[name](part or split) if name in PACKAGED else read_table(given, spec)


def _name_and_split(given: str | None, dataset: str | None, split: str) -> tuple[str, str]:
    """Set and split of the `datasets` library; an empty name where the split was not asked for."""
    if dataset is not None:
        part = given or (split if split == "train" else "")
        return (dataset, part) if part else ("", "")
    if given is None:
        return "", ""
    name, colon, part = given.rpartition(":")
    return (name, part) if colon else (given, split)
