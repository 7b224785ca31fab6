"""Texts to continue (causal_lm) and texts to turn into others (seq2seq)."""
from itertools import chain
from typing import TYPE_CHECKING, Any

from slimtune.data.columns import texts
from slimtune.data.examples import Collate, Examples, Row, count_cut, tokenise
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def label_names(spec: DataSpec, train: Table) -> tuple[str, ...]:
    """None: the vocabulary is the label set."""
    return ()


def encode_causal(table: Table, spec: DataSpec, tokenizer: "Tokenizer", names: tuple[str, ...],
                  labelled: bool) -> Examples:
    """Rows whose labels are their input_ids (the model shifts them): blocks when packing, else texts.

    Blocks run across texts; attention is not cut at the end token between them.
    """
    values = texts(table, spec.text, "text", spec.allow_empty)
    end: Any = tokenizer.eos_token_id
    if spec.pack:
        ids = tokenizer(values, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        rows = [_row(block) for block in blocks([closed(one, end) for one in ids], spec.max_length)]
        return Examples(table.name, rows)
    encoded, encoding = tokenise(tokenizer, values, spec.max_length)
    # A text that fills max_length may have been cut, so that its end is not the end of the text.
    rows = [_row(ids if len(ids) == spec.max_length else closed(ids, end))
            for ids in (one["input_ids"] for one in encoded)]
    return Examples(table.name, rows, count_cut(encoding))


def _row(ids: list[int]) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}


def closed(ids: list[int], end: int | None) -> list[int]:
    """Ids with the end token last, where there is one."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def blocks(texts: list[list[int]], length: int) -> list[list[int]]:
    """All texts joined and cut into blocks of one length; the last may be shorter. Nothing is lost.

    Example:
        >>> blocks([[1, 2, 0], [3, 0]], 2)
        [[1, 2], [0, 3], [0]]
    """
    stream = list(chain.from_iterable(texts))
    return [stream[i:i + length] for i in range(0, len(stream), length)]


def encode_seq2seq(table: Table, spec: DataSpec, tokenizer: "Tokenizer", names: tuple[str, ...],
                   labelled: bool) -> Examples:
    """Rows of a source's input_ids ..., and a target's ids as labels (the model shifts them right)."""
    rows, encoding = tokenise(tokenizer, texts(table, spec.text, "text", spec.allow_empty), spec.max_length)
    cut = count_cut(encoding)
    if labelled:
        limit = spec.max_target_length or spec.max_length
        targets = texts(table, spec.target, "target", spec.allow_empty)
        answers = tokenizer(text_target=targets, truncation=True, max_length=limit)
        cut += count_cut(answers)
        for row, ids in zip(rows, answers["input_ids"], strict=True):
            row["labels"] = ids
    return Examples(table.name, rows, cut)


def collator(tokenizer: "Tokenizer") -> Collate:
    """Pads a batch to its longest text, and its labels with -100.

    For causal_lm too: transformers' own collator for it unmarks every label that equals the padding
    token, so that a model whose end token pads would never learn to stop.
    """
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
