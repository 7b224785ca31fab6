"""digits: 1,797 scans of handwritten digits, 8 x 8 pixels of 17 greys, from scikit-learn, which is installed anyway.

The first 1,297 are train, the last 500 are test. All are of the test part of UCI's "Optical Recognition of Handwritten
Digits" (CC BY 4.0). Source: Alpaydin and Kaynak, 1998, doi 10.24432/C50P49.
"""
from slimtune.data.picture import Picture
from slimtune.data.tables import Table
from slimtune.errors import DataError, listing, suggest

PARTS = {"train": slice(0, 1297), "test": slice(1297, 1797)}


def load(split: str) -> Table:
    """The digits of a split: columns image and label. Errors: DataError for another split."""
    import numpy as np
    from sklearn.datasets import load_digits

    if split not in PARTS:
        raise DataError(f"digits: no split '{split}'.", f"It has: {listing(PARTS)}", suggest(split, PARTS))
    found = load_digits()
    scans = np.round(found.images * (255 / 16)).astype(np.uint8)[PARTS[split]]  # type: ignore[union-attr]
    labels = [str(label) for label in found.target[PARTS[split]]]  # type: ignore[union-attr]
    pictures = [Picture(f"digits:{split}, image {i + 1}", data=scan) for i, scan in enumerate(scans)]
    return Table(f"digits:{split}", {"image": pictures, "label": labels}, list(range(1, len(labels) + 1)), "image")
