"""FGVC: five fine-grained sets, in the split files that came with VPT: train.json, val.json and test.json.

Each is one object {file name: class}, classes being any integers. File names start in the set's image folder:
`images` (CUB-200, NABirds), `Images` (Stanford Dogs) or the set's own folder (Flowers, Cars). val.json is a tenth of
the training data where the set has no validation data of its own, and is never trained on.
Source: Jia et al., 2022, "Visual Prompt Tuning", arXiv 2203.12119, appendix.
"""
import json
from pathlib import Path

from slimtune.data.imagetables import make_table
from slimtune.data.layout import Layout, home_of
from slimtune.data.picture import exists, picture_at
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table, read_text
from slimtune.errors import DataError

FILES = ("train.json", "val.json", "test.json")


def read(spec: DataSpec) -> Layout:
    """train and val; test as well in the final run. Errors: DataError naming the file and the image."""
    home = home_of(spec, FILES, "FGVC")
    train, validation = (_split(home, name, spec) for name in FILES[:2])
    test = _split(home, FILES[2], spec) if spec.stage == "final" else None
    classes = {int(label) for table in (train, validation, test) if table for label in table.columns[spec.label]}
    return Layout(train, validation, test, tuple(map(str, sorted(classes))))


def _split(home: Path, name: str, spec: DataSpec) -> Table:
    path = home / name
    if not path.is_file():
        raise DataError(f"{path}: no such file.", "An FGVC set has train.json, val.json and test.json.")
    try:
        tree = json.loads(read_text(path, "utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}.") from None
    if not isinstance(tree, dict) or not all(type(label) is int for label in tree.values()):
        raise DataError(f"{path}: not an object of file names and class numbers.", 'It reads {"a/b.jpg": 3, ...}')
    roots = [home / folder for folder in ("images", "Images", ".")]
    first = next(iter(tree), "")
    root = next((root for root in roots if exists(picture_at(root, first))), roots[-1])
    found = [picture_at(root, file) for file in tree]
    lost = next((i for i, picture in enumerate(found) if not exists(picture)), None)
    if lost is not None:
        raise DataError(f"{path}: no such image: {found[lost].name}, entry {lost + 1}.", f"It was looked for in {root}")
    return make_table(str(path), found, list(tree.values()), spec, unit="entry")
