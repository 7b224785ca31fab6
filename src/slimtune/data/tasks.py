"""prepare: from a DataSpec and a tokenizer (or, for images, a transform) to examples and their collator."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimtune.data import image_classification, language_modeling, text_classification, token_classification
from slimtune.data.examples import Collate, Examples, Prepared, log, make_ready
from slimtune.data.imagerows import ImageRows
from slimtune.data.spec import IMAGES, LABELLED, MULTI_LABEL, SPLITS, DataSpec
from slimtune.data.splits import Splits, read_splits
from slimtune.data.tables import Table
from slimtune.data.transform import Transform
from slimtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Family:
    """How one task reads tables."""

    encode: Callable[..., Examples]
    label_names: Callable[[DataSpec, Table], tuple[str, ...]]
    collator: Callable[..., Collate]


_TEXT, _WORDS, _LANGUAGE, _IMAGE = text_classification, token_classification, language_modeling, image_classification
FAMILIES = {
    "classification": Family(_TEXT.encode, _TEXT.label_names, _TEXT.collator),
    "regression": Family(_TEXT.encode, _TEXT.label_names, _TEXT.collator),
    "token_classification": Family(_WORDS.encode, _WORDS.label_names, _WORDS.collator),
    "causal_lm": Family(_LANGUAGE.encode_causal, _LANGUAGE.label_names, _LANGUAGE.collator),
    "seq2seq": Family(_LANGUAGE.encode_seq2seq, _LANGUAGE.label_names, _LANGUAGE.collator),
    "image_classification": Family(_IMAGE.encode, _TEXT.label_names, _IMAGE.collator),
    MULTI_LABEL: Family(_IMAGE.encode, _IMAGE.multi_label_names, _IMAGE.collator),
}
NAMED = ("classification", "token_classification", *IMAGES)
"""Tasks whose outputs have names."""


def prepare(spec: DataSpec, tokenizer: "Tokenizer | Transform") -> Prepared:
    """Read, check, split and tokenise (or decode) the data of a run, once.

    The same spec and tokenizer give the same examples in the same order in any process. The tokenizer
    is made to pad on the right, with its end token if it has no padding token. For images it is a transform:
    `transform_of(spec, load_image_input(model))`.
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
    _ready(tokenizer, spec)
    splits = read_splits(spec)
    names = splits.names if splits.names and spec.labels is None else _names(spec, family, splits.whole)

    train, validation, test = (_encoded(split, splits, spec, tokenizer, names) for split in SPLITS)
    images = None
    if isinstance(tokenizer, Transform):
        images = _about(tokenizer, {"train": train, "validation": validation, "test": test})
    problem = {MULTI_LABEL: "multi_label_classification"}.get(spec.task, spec.task)
    problem = "single_label_classification" if spec.task in LABELLED else problem
    return Prepared(spec.task, train, validation, test, names, 1 if spec.task == "regression" else len(names), problem,
                    family.collator(tokenizer), images)


def _encoded(split: str, splits: Splits, spec: DataSpec, reader: "Tokenizer | Transform",
             names: tuple[str, ...]) -> Examples | None:
    """One split, the images of train with their augmentation; None where there is none."""
    table: Table | None = getattr(splits, split)
    if table is None:
        return None
    if split == "train" and isinstance(reader, Transform):
        reader = reader.for_training()
    found = FAMILIES[spec.task].encode(table, spec, reader, names, labelled=True)
    if found.cut:
        log.info("%s: %d of %d texts are longer than %d tokens and were cut", split, found.cut, len(table),
                 spec.max_length)
    return replace(found, name=split)


def _about(transform: Transform, made: dict[str, Examples | None]) -> dict[str, Any]:
    bad = {split: [f"{error.picture}: {error.why}" for error in examples.rows.bad]
           for split, examples in made.items() if examples and isinstance(examples.rows, ImageRows)}
    return transform.about() | {"left_out": {split: found for split, found in bad.items() if found}}


def _ready(tokenizer: "Tokenizer | Transform", spec: DataSpec) -> None:
    if (spec.task in IMAGES) != isinstance(tokenizer, Transform):
        raise DataError(f"{spec.task} does not read with a {type(tokenizer).__name__}.",
                        f"{' and '.join(IMAGES)} need a Transform, every other task a tokenizer.")
    if not isinstance(tokenizer, Transform):
        make_ready(tokenizer, spec)


def prepare_unlabelled(spec: DataSpec, tokenizer: "Tokenizer | Transform", table: Table) -> Examples:
    """Examples to predict on: the texts or images of a table, whether or not it has labels."""
    _ready(tokenizer, spec)
    return FAMILIES[spec.task].encode(table, spec, tokenizer, (), labelled=False)


def _names(spec: DataSpec, family: Family, train: Table | None) -> tuple[str, ...]:
    """The label names: given, or those of the whole training table."""
    if spec.labels is not None and spec.task in NAMED:
        return spec.labels
    if train is not None:
        return family.label_names(spec, train)
    if spec.task in NAMED:
        raise DataError("data.labels: without training data the label names must be given.",
                        "A saved delta knows them; by hand: data.labels=[negative,positive].")
    return ()
