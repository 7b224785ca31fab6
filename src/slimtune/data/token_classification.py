"""Words with a tag each. A word's tag stands on its first token; its other tokens are not scored."""
from typing import TYPE_CHECKING

from slimtune.data.columns import index_labels, order_of, tag_column, word_column
from slimtune.data.examples import IGNORED, Collate, Examples, count_cut, log, tokenise
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table
from slimtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def label_names(spec: DataSpec, train: Table) -> tuple[str, ...]:
    """Names of the tags in the order of the outputs."""
    names = order_of({tag for tags in tag_column(train, spec.label) for tag in tags})
    if len(names) < 2:
        raise DataError(f"{train.name}: column '{spec.label}' holds fewer than two tags: "
                        f"{', '.join(names) or 'none'}.", "Is data.label the right column?")
    return names


def encode(table: Table, spec: DataSpec, tokenizer: "Tokenizer", names: tuple[str, ...],
           labelled: bool) -> Examples:
    """Rows of input_ids ... and labels: a tag index on the first token of each word, else -100.

    Errors: DataError for rows with more or fewer tags than words, and for tokenizers that lose the words.
    """
    _needs_words(tokenizer)
    words = word_column(table, spec.text, "text", spec.allow_empty)
    rows, encoding = tokenise(tokenizer, words, spec.max_length, is_split_into_words=True)
    if labelled:
        known = {name: i for i, name in enumerate(names)}
        lost = 0
        for i, tags in enumerate(tag_column(table, spec.label)):
            if len(tags) != len(words[i]):
                raise DataError(f"{table.place(i)}: {len(words[i])} words but {len(tags)} tags.",
                                f"Words: {' '.join(words[i])[:80]}", f"Tags: {' '.join(tags)[:80]}")
            ids = index_labels(table, i, tags, known, "data.labels" if spec.labels else "train")
            rows[i]["labels"] = align(encoding.word_ids(i), ids)
            lost += len(ids) - sum(label != IGNORED for label in rows[i]["labels"])
        if lost:
            log.info("%s: %d tags are not scored: their words were cut off or have no token",
                     table.name, lost)
    return Examples(table.name, rows, count_cut(encoding))


def align(word_ids: list[int | None], labels: list[int]) -> list[int]:
    """Labels of words as labels of tokens.

    Example:
        >>> align([None, 0, 0, 1, None], [7, 8])
        [-100, 7, -100, 8, -100]
    """
    previous = [None, *word_ids[:-1]]
    return [IGNORED if word is None or word == before else labels[word]
            for word, before in zip(word_ids, previous, strict=True)]


def _needs_words(tokenizer: "Tokenizer") -> None:
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} does not tell which word a token came from.",
                        "token_classification needs a fast tokenizer (a tokenizer.json beside the model).")
    apart, text = tokenizer(["a", "b"], is_split_into_words=True)["input_ids"], tokenizer("a b")["input_ids"]
    read = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in (apart, text)]
    # Byte-level tokenizers mark a word by the space before it, and words in a list have none.
    if read[0] == "ab" != read[1]:
        raise DataError(f"{type(tokenizer).__name__} glues the words of a list together: 'a', 'b' is read as 'ab'.",
                        "Load it with add_prefix_space=True: load_tokenizer(path, words=True).")


def collator(tokenizer: "Tokenizer") -> Collate:
    """Pads a batch to its longest text, and its labels with -100."""
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer)
