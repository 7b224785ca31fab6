"""Columns of a table as texts, label names, numbers or words; the first row that is none is named."""
import math
from collections.abc import Sequence
from typing import Any

from slimtune.data.tables import Table
from slimtune.errors import DataError, listing, suggest


def column(table: Table, name: str, key: str) -> list[Any]:
    """A column that the key of the recipe asked for, without missing values.

    Errors: DataError when there is no such column, or a row has no value in it.
    """
    if name not in table.columns:
        raise DataError(f"{table.name}: no column '{name}' (data.{key}).",
                        f"It has: {listing(table.columns)}",
                        suggest(name, table.columns) or f"Set data.{key} to one of these.")
    values = table.columns[name]
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{table.place(row)}: no value in column '{name}' (data.{key}).")
    return values


def texts(table: Table, name: str, key: str, allow_empty: bool = False) -> list[str]:
    """A column of texts. Errors: DataError for values that are no text, and for empty ones unless allowed."""
    values = column(table, name, key)
    for row, value in enumerate(values):
        _check_text(value, f"{table.place(row)}, column '{name}'")
    _refuse_empty(table, name, [row for row, value in enumerate(values) if not value.strip()], allow_empty)
    return values


def _check_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{place}: {value!r} is not text.",
                        "Set the column that holds the texts, or quote the values.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: character {error.start} is half of a surrogate pair.") from None


def _refuse_empty(table: Table, name: str, empty: list[int], allowed: bool) -> None:
    if empty and not allowed:
        where = ", ".join(str(table.numbers[row]) for row in empty[:5]) + (" ..." if len(empty) > 5 else "")
        raise DataError(f"{table.name}: {len(empty)} of {len(table)} rows are empty in column '{name}' "
                        f"({table.unit} {where}).", "Remove these rows, or set data.allow_empty=true.")


def label_column(table: Table, name: str) -> list[str]:
    """A column of labels as names, without spaces around them: 1 is '1', True is 'True'."""
    return [_label(value, f"{table.place(row)}, column '{name}'")
            for row, value in enumerate(column(table, name, "label"))]


def label_sets(table: Table, name: str) -> list[list[str]]:
    """A column of label lists, each label once; a text is split at its commas; an image may have none.

    Errors: DataError for values that are neither.
    """
    rows = []
    for row, value in enumerate(column(table, name, "label")):
        given = [one for one in value.split(",") if one.strip()] if isinstance(value, str) else value
        given = given if isinstance(given, list) else [given]
        rows.append(list(dict.fromkeys(_label(one, f"{table.place(row)}, column '{name}'") for one in given)))
    return rows


def _label(value: Any, place: str) -> str:
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{place}: {value!r} is not a label.", "A label is a name or an integer.")
    if not str(value).strip():
        raise DataError(f"{place}: the label is empty.", "Remove the row, or give it a label.")
    return str(value).strip()


def numbers(table: Table, name: str) -> list[float]:
    """A column of finite numbers. Errors: DataError naming the first row that has none."""
    return [_number(value, f"{table.place(row)}, column '{name}'")
            for row, value in enumerate(column(table, name, "label"))]


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{place}: {value!r} is not a number.", "regression needs a number in every row; "
                        "for names use task=classification.") from None
    if not math.isfinite(number):
        raise DataError(f"{place}: {value!r} is not a finite number.", "Remove the row, or give it a number.")
    return number


def word_column(table: Table, name: str, key: str, allow_empty: bool = False) -> list[list[str]]:
    """A column of word lists; a text is split at spaces.

    Errors: DataError for values that are neither, and for rows without words unless allowed.
    """
    rows = []
    for row, value in enumerate(column(table, name, key)):
        place = f"{table.place(row)}, column '{name}'"
        if isinstance(value, list):
            for word in value:
                _check_text(word, place)
            rows.append(value)
        else:
            _check_text(value, place)
            rows.append(value.split())
    _refuse_empty(table, name, [row for row, words in enumerate(rows) if not words], allow_empty)
    return rows


def tag_column(table: Table, name: str) -> list[list[str]]:
    """A column of tag lists; a text is split at spaces; integers become their digits."""
    rows = []
    for row, value in enumerate(column(table, name, "label")):
        place = f"{table.place(row)}, column '{name}'"
        tags = value if isinstance(value, list) else str(value).split()
        rows.append([_label(tag, place) for tag in tags])
    return rows


def order_of(labels: set[str]) -> tuple[str, ...]:
    """Label names in order: by value if all are integers, else as text.

    Example:
        >>> order_of({"10", "9"}), order_of({"pos", "neg"})
        (('9', '10'), ('neg', 'pos'))
    """
    try:
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(labels))


def index_labels(table: Table, row: int, labels: Sequence[str], known: dict[str, int],
                 whose: str) -> list[int]:
    """The indices of a row's labels. Errors: DataError naming the row and the label that is not known."""
    for label in labels:
        if label not in known:
            raise DataError(f"{table.place(row)}: label '{label}' is not among the labels of {whose}.",
                            f"They are: {listing(known)}", suggest(label, known))
    return [known[label] for label in labels]
