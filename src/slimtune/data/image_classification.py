"""Images with a class each."""
from slimtune.data.columns import column, index_labels, label_column
from slimtune.data.examples import Collate, Examples, log
from slimtune.data.imagerows import ImageRows
from slimtune.data.picture import refuse
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.data.transform import Transform
from slimtune.errors import DataError


def encode(table: Table, spec: DataSpec, transform: Transform, names: tuple[str, ...], labelled: bool) -> Examples:
    """Rows of pixel_values, bytes, and labels, class indices; every image has been decoded once.

    Errors: DataError naming images that cannot be decoded (spec.corrupt=skip leaves them out), and unknown labels.
    """
    labels = None
    if labelled:
        known = {name: i for i, name in enumerate(names)}
        whose = "data.labels" if spec.labels else "train"
        labels = [index_labels(table, row, [label], known, whose)[0]
                  for row, label in enumerate(label_column(table, spec.label))]
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


def collator(transform: Transform) -> Collate:
    """Scales and normalises a batch."""
    return transform.collate
