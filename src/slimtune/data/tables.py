"""Tables: columns of a local file, read with the standard library, pyarrow or `datasets`; no pandas.

Every row remembers the line it came from, so that an error can name it.
"""
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from slimtune.data.delimited import read_delimited
from slimtune.data.spec import DataSpec
from slimtune.errors import DataError, ExtraError, listing, suggest


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and for each row its line (or number) in the source.

    Example:
        >>> table = Table("a.csv", {"text": ["x", "y"]}, [2, 3], "line")
        >>> len(table), table.place(1)
        (2, 'a.csv, line 3')
    """

    name: str
    columns: dict[str, list[Any]]
    numbers: list[int]
    unit: str = "row"

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, row: int) -> str:
        """Where a row is, for people."""
        return f"{self.name}, {self.unit} {self.numbers[row]}"

    def take(self, rows: Sequence[int]) -> "Table":
        """These rows, in this order."""
        return Table(self.name, {name: [values[i] for i in rows] for name, values in self.columns.items()},
                     [self.numbers[i] for i in rows], self.unit)


def read_table(path: str, spec: DataSpec) -> Table:
    """Read a local file by its suffix: .csv .tsv .jsonl .json .parquet .txt.

    Errors: DataError naming the file, and the line where there is one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise _missing(file)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of kind '{file.suffix}' cannot be read.",
                        f"It reads: {listing(_READERS)}", suggest(file.suffix, _READERS))
    table = reader(file, spec)
    if not len(table):
        raise DataError(f"{path}: the file has no rows.", f"Its columns: {listing(table.columns) or 'none'}")
    return table


def _missing(file: Path) -> DataError:
    if file.is_dir():
        return DataError(f"{file}: is a folder, not a file.",
                         f"It has: {listing(sorted(p.name for p in file.iterdir()), 12)}",
                         "Folders of the `datasets` library are read with data.source=datasets.")
    folder = file.parent
    if not folder.is_dir():
        return DataError(f"{file}: no such file; the folder {folder} does not exist either.",
                         "Paths are taken from the folder the command is run in.")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _READERS)
    near = get_close_matches(file.name, names, n=3, cutoff=0.5)
    return DataError(f"{file}: no such file.",
                     f"The folder has: {listing(names, 12) or 'no file that can be read'}",
                     f"Nearest: {listing(near)}" if near else "")


def read_text(file: Path, encoding: str) -> str:
    """A whole text file, without its byte order mark.

    Errors: DataError naming the line and byte that do not decode.
    """
    data = file.read_bytes()
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: byte {error.start} (0x{data[error.start]:02x}) is not {encoding}.",
            "Save it as UTF-8, or name its encoding: data.encoding=latin-1, cp1252, utf-16 ...") from None
    except LookupError:
        raise DataError(f"data.encoding: no such encoding '{encoding}'.",
                        "Usual ones: utf-8 latin-1 cp1252") from None


def _delimited(file: Path, spec: DataSpec) -> Table:
    names, rows, lines = read_delimited(str(file), read_text(file, spec.encoding), spec)
    return Table(str(file), {name: [row[i] for row in rows] for i, name in enumerate(names)}, lines, "line")


def _paragraphs(file: Path, spec: DataSpec) -> Table:
    """A row for each run of lines that are not blank, in the column that spec.text names."""
    texts: list[str] = []
    lines: list[int] = []
    fresh = True
    for number, line in enumerate(read_text(file, spec.encoding).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            fresh = True
        elif fresh:
            texts.append(line)
            lines.append(number)
            fresh = False
        else:
            texts[-1] += "\n" + line
    return Table(str(file), {spec.text: texts}, lines, "line")


def _load_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at character {error.colno}.",
                        f"It reads: {text[:60]!r}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not readable as JSON: {error}.") from None


def _json_lines(file: Path, spec: DataSpec) -> Table:
    lines = enumerate(read_text(file, spec.encoding).split("\n"), 1)
    rows = [(i, _load_json(line, f"{file}, line {i}")) for i, line in lines if line.strip()]
    return _from_objects(str(file), rows, "line")


def _json(file: Path, spec: DataSpec) -> Table:
    """A list of objects, or one object whose values are columns."""
    tree = _load_json(read_text(file, spec.encoding), str(file))
    if isinstance(tree, list):
        return _from_objects(str(file), list(enumerate(tree, 1)), "row")
    if isinstance(tree, dict) and tree and all(isinstance(column, list) for column in tree.values()):
        sizes = {name: len(column) for name, column in tree.items()}
        if len(set(sizes.values())) == 1:
            return Table(str(file), tree, list(range(1, len(next(iter(tree.values()))) + 1)))
        raise DataError(f"{file}: its columns differ in length: "
                        f"{listing(f'{name}={size}' for name, size in sizes.items())}")
    raise DataError(f"{file}: holds {_kind(tree)}; a table is expected.",
                    'A table is a list of objects, [{"text": ..., "label": ...}, ...], or one object',
                    "of columns. One object a line is the .jsonl format.")


def _from_objects(name: str, rows: list[tuple[int, Any]], unit: str) -> Table:
    """A key that an object lacks becomes None, which whoever needs the column refuses."""
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{name}, {unit} {number}: holds {_kind(row)}; an object is expected, "
                            "with a key for each column.")
    keys = dict.fromkeys(key for _, row in rows for key in row)
    return Table(name, {key: [row.get(key) for _, row in rows] for key in keys}, [n for n, _ in rows], unit)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _parquet(file: Path, spec: DataSpec) -> Table:
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ExtraError("pyarrow", "parquet", "Reading parquet files") from None
    try:
        with ParquetFile(file) as parquet:
            table = parquet.read()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as parquet: {_first_line(error)}") from None
    columns = {name: table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    return Table(str(file), columns, list(range(1, table.num_rows + 1)))


def read_dataset(name: str, split: str) -> Table:
    """One split of a set of the `datasets` library: a folder, or a name.

    Class labels become their names. Errors: DataError, ExtraError.
    """
    try:
        import datasets
    except ImportError:
        raise ExtraError("datasets", "datasets", f"Reading '{name}' with data.source=datasets") from None
    folder = Path(name).expanduser()
    try:
        if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            data = datasets.load_from_disk(str(folder))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(str(folder) if folder.is_dir() else name, split=split)
    except Exception as error:  # the library raises nearly every kind; all mean "cannot be read"
        raise DataError(f"{name}:{split}: `datasets` cannot read it: {_first_line(error)}",
                        "Give a local folder, or a set in its cache, as NAME:SPLIT.") from None
    for key in [key for key, feature in data.features.items() if isinstance(feature, datasets.Image)]:
        data = data.cast_column(key, datasets.Image(decode=False))  # bytes, which are decoded where they are needed
    columns = {key: list(_named(data.features[key], data[key])) for key in data.column_names}
    return Table(f"{name}:{split}", columns, list(range(1, len(data) + 1)))


def _named(feature: Any, values: Any) -> Iterator[Any]:
    """Values with class labels as names, also inside lists; -1 stands for no label."""
    inner = getattr(feature, "feature", feature)
    for value in values:
        if not hasattr(inner, "int2str") or value is None:
            yield value
        elif isinstance(value, list):
            yield [inner.int2str(v) for v in value]
        else:
            yield inner.int2str(value) if value >= 0 else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


_READERS: dict[str, Callable[[Path, DataSpec], Table]] = {
    ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet,
    ".txt": _paragraphs}
