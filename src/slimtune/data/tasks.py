"""prepare: from a DataSpec and a tokenizer to examples and their collator, for every task."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimtune.data import language_modeling, text_classification, token_classification
from slimtune.data.examples import Collate, Examples, Prepared, log, make_ready
from slimtune.data.spec import DataSpec
from slimtune.data.splits import read_splits
from slimtune.data.tables import Table
from slimtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Family:
    """How one task reads tables."""

    encode: Callable[..., Examples]
    label_names: Callable[[DataSpec, Table], tuple[str, ...]]
    collator: Callable[..., Collate]


_TEXT, _WORDS, _LANGUAGE = text_classification, token_classification, language_modeling
FAMILIES = {
    "classification": Family(_TEXT.encode, _TEXT.label_names, _TEXT.collator),
    "regression": Family(_TEXT.encode, _TEXT.label_names, _TEXT.collator),
    "token_classification": Family(_WORDS.encode, _WORDS.label_names, _WORDS.collator),
    "causal_lm": Family(_LANGUAGE.encode_causal, _LANGUAGE.label_names, _LANGUAGE.collator),
    "seq2seq": Family(_LANGUAGE.encode_seq2seq, _LANGUAGE.label_names, _LANGUAGE.collator),
}


def prepare(spec: DataSpec, tokenizer: "Tokenizer") -> Prepared:
    """Read, check, split and tokenise the data of a run, once.

    The same spec and tokenizer give the same examples in the same order in any process. The tokenizer
    is made to pad on the right, with its end token if it has no padding token.
    Errors: DataError, ExtraError.

    Example:
        >>> import pathlib, tempfile, transformers
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]
        >>> tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        >>> with tempfile.TemporaryDirectory() as home:
        ...     path = pathlib.Path(home, "train.csv")
        ...     _ = path.write_text("text,label\\ngood,pos\\nfilm,neg\\ngood film,pos\\n")
        ...     spec = DataSpec(task="classification", train=str(path), validation_fraction=0)
        ...     data = prepare(spec, tokenizer)
        >>> data.label_names, data.collate([data.train[0], data.train[2]])["input_ids"].tolist()
        (('neg', 'pos'), [[2, 5, 3, 0], [2, 5, 6, 3]])
    """
    family = FAMILIES[spec.task]
    make_ready(tokenizer, spec)
    splits = read_splits(spec)
    names = _names(spec, family, splits.whole)

    def encode(split: str) -> Examples | None:
        table: Table | None = getattr(splits, split)
        if table is None:
            return None
        found = family.encode(table, spec, tokenizer, names, labelled=True)
        if found.cut:
            log.info("%s: %d of %d texts are longer than %d tokens and were cut", split, found.cut, len(table),
                     spec.max_length)
        return replace(found, name=split)

    problem = "single_label_classification" if spec.task == "classification" else spec.task
    return Prepared(spec.task, encode("train"), encode("validation"), encode("test"), names,
                    1 if spec.task == "regression" else len(names), problem, family.collator(tokenizer))


def prepare_unlabelled(spec: DataSpec, tokenizer: "Tokenizer", table: Table) -> Examples:
    """Examples to predict on: the text columns of a table, whether or not it has labels."""
    make_ready(tokenizer, spec)
    return FAMILIES[spec.task].encode(table, spec, tokenizer, (), labelled=False)


def _names(spec: DataSpec, family: Family, train: Table | None) -> tuple[str, ...]:
    """The label names: given, or those of the whole training table."""
    if spec.labels is not None and spec.task in ("classification", "token_classification"):
        return spec.labels
    if train is not None:
        return family.label_names(spec, train)
    if spec.task in ("classification", "token_classification"):
        raise DataError("data.labels: without training data the label names must be given.",
                        "A saved delta knows them; by hand: data.labels=[negative,positive].")
    return ()
