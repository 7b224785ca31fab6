"""Layout: the splits of a published image benchmark, as a reader of its folder gives them."""
from dataclasses import dataclass
from pathlib import Path

from slimtune.data.picture import names_of
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.errors import DataError


@dataclass(frozen=True)
class Layout:
    """train, validation and test as the benchmark and the stage say; a split that is not to be read is None.

    names: of all classes, in the order of the outputs. held: share of train that is cut off for validation.
    """

    train: Table
    validation: Table | None
    test: Table | None
    names: tuple[str, ...]
    held: float = 0.0


def home_of(spec: DataSpec, files: tuple[str, ...], what: str) -> Path:
    """The folder `spec.path`, which must hold one of the files. Errors: DataError that says what it holds."""
    folder = Path(spec.path or ".").expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (data.path).", f"It is the folder of one {what} set.")
    if not any((folder / name).is_file() for name in files):
        inside = sorted(p.parent.name for name in files for p in folder.glob(f"*/{name}"))
        raise DataError(f"{folder}: not a {what} set: it has no {' or '.join(files)}.", f"It has: {names_of(folder)}",
                        f"Sets inside it: {' '.join(dict.fromkeys(inside))}" if inside else "")
    return folder
