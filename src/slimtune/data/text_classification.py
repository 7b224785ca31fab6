"""Texts and pairs of texts with a label or a number: classification and regression."""
from typing import TYPE_CHECKING

from slimtune.data.columns import index_labels, label_column, numbers, order_of, texts
from slimtune.data.examples import Collate, Examples, count_cut, tokenise
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def label_names(spec: DataSpec, train: Table) -> tuple[str, ...]:
    """Names of the classes in the order of the outputs; empty for regression."""
    if spec.task == "regression":
        return ()
    names = order_of(set(label_column(train, spec.label)))
    if len(names) < 2:
        raise DataError(f"{train.name}: every row has the label '{''.join(names)}' (column '{spec.label}'); "
                        "there is nothing to tell apart.", "Is data.label the right column?")
    return names


def encode(table: Table, spec: DataSpec, tokenizer: "Tokenizer", names: tuple[str, ...],
           labelled: bool) -> Examples:
    """Rows of input_ids ... and labels: a class index, or a float for regression."""
    first = texts(table, spec.text, "text", spec.allow_empty)
    second = texts(table, spec.pair, "pair", spec.allow_empty) if spec.pair else None
    rows, encoding = tokenise(tokenizer, first, spec.max_length, text_pair=second)
    if labelled:
        for row, label in zip(rows, _labels(table, spec, names), strict=True):
            row["labels"] = label
    return Examples(table.name, rows, count_cut(encoding))


def _labels(table: Table, spec: DataSpec, names: tuple[str, ...]) -> list[int] | list[float]:
    if spec.task == "regression":
        return numbers(table, spec.label)
    known = {name: i for i, name in enumerate(names)}
    whose = "data.labels" if spec.labels else "train"
    return [index_labels(table, row, [label], known, whose)[0]
            for row, label in enumerate(label_column(table, spec.label))]


def collator(tokenizer: "Tokenizer") -> Collate:
    """Pads a batch to its longest text."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)
