"""Delimited text (.csv, .tsv): header, rows and their lines, or an error that names the line."""
import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from slimtune.data.spec import DataSpec
from slimtune.errors import DataError, listing

Rows = tuple[list[str], list[list[str]], list[int]]


def read_delimited(name: str, text: str, spec: DataSpec) -> Rows:
    """Column names, rows of equal length, and the line each row starts on.

    Errors: DataError for rows of another length than the header, open quotes, repeated names.

    Example:
        >>> read_delimited("a.csv", "text,label\\nfine,1\\n", DataSpec(task="classification", train="a.csv"))
        (['text', 'label'], [['fine', '1']], [2])
    """
    tab = Path(name).suffix.lower() == ".tsv"
    delimiter = spec.delimiter or ("\t" if tab else ",")
    quoting = spec.quoting if spec.quoting is not None else not tab
    numbered = iter(_quoted(name, text, delimiter)) if quoting else _plain(text, delimiter)
    first = next(numbered, None) if spec.header else None
    names = list(first[1] if first else spec.columns or ())
    repeated = {column for column in names if column and names.count(column) > 1}
    if repeated:
        raise DataError(f"{name}: columns named twice: {listing(sorted(repeated))}",
                        f"Its header: {listing(names)}")
    rows, lines = [], []
    for line, row in numbered:
        if len(row) != len(names):
            raise _ragged(name, line, row, names, quoting, delimiter)
        rows.append(row)
        lines.append(line)
    return names, rows, lines


def _plain(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Fields in which quotes are characters like any other."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split(delimiter)


def _quoted(name: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    rows, line = [], 1
    with _long_fields():
        reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{name}: the row that starts on line {line} is not well quoted: {error}.",
                            'Quotes inside "..." are doubled. If quotes are plain characters here, '
                            "set data.quoting=false.") from None
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields above 131,072 characters; a document may be longer."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _ragged(name: str, line: int, row: list[str], names: list[str], quoting: bool,
            delimiter: str) -> DataError:
    advice = f"A field that holds {delimiter!r} must stand in double quotes."
    if not quoting:
        advice = "If double quotes enclose fields here, set data.quoting=true."
    return DataError(f"{name}, line {line}: {len(row)} fields, but there are {len(names)} columns.",
                     f"Its columns: {listing(names)}", f"The row begins: {delimiter.join(row)[:60]!r}",
                     advice)
