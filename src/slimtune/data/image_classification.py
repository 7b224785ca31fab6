"""Images with a class each, or with any number of labels."""
from typing import Any

from slimtune.data.columns import column, index_labels, label_column, label_sets, order_of
from slimtune.data.examples import Collate, Examples, log
from slimtune.data.imagerows import ImageRows
from slimtune.data.picture import refuse
from slimtune.data.spec import MULTI_LABEL, DataSpec
from slimtune.data.tables import Table
from slimtune.data.transform import Transform
from slimtune.errors import DataError


def encode(table: Table, spec: DataSpec, transform: Transform, names: tuple[str, ...], labelled: bool) -> Examples:
    """Rows of pixel_values, bytes, and labels: class indices, or 0 and 1 for each class; every image has been decoded.

    Errors: DataError naming images that cannot be decoded (spec.corrupt=skip leaves them out), and unknown labels.
    """
    labels = _labels(table, spec, names) if labelled else None
    rows = ImageRows(column(table, spec.image, "image"), labels, transform, spec.seed)
    if rows.bad and spec.corrupt == "refuse":
        raise refuse(rows.bad, len(table), table.name)
    if rows.bad:
        log.warning("%s: %d of %d images cannot be decoded and are left out: %s", table.name, len(rows.bad), len(table),
                    "; ".join(f"{bad.picture} {bad.why}" for bad in rows.bad[:5]) + (" ..." * (len(rows.bad) > 5)))
    if not rows and labelled:
        raise DataError(f"{table.name}: none of its {len(table):,} images can be decoded.",
                        f"{rows.bad[0].picture}: {rows.bad[0].why}")
    return Examples(table.name, rows)


def _labels(table: Table, spec: DataSpec, names: tuple[str, ...]) -> list[Any]:
    known = {name: i for i, name in enumerate(names)}
    whose = "data.labels" if spec.labels else "train"
    if spec.task != MULTI_LABEL:
        return [index_labels(table, row, [label], known, whose)[0]
                for row, label in enumerate(label_column(table, spec.label))]
    found = (set(index_labels(table, row, labels, known, whose))
             for row, labels in enumerate(label_sets(table, spec.label)))
    return [[float(i in own) for i in range(len(names))] for own in found]


def multi_label_names(spec: DataSpec, train: Table) -> tuple[str, ...]:
    """Names of all labels, in the order of the outputs. Errors: DataError where no image has one."""
    names = order_of({label for labels in label_sets(train, spec.label) for label in labels})
    if not names:
        raise DataError(f"{train.name}: no image has a label (column '{spec.label}').",
                        "Is data.label the right column?")
    return names


def collator(transform: Transform) -> Collate:
    """Scales and normalises a batch."""
    return transform.collate
