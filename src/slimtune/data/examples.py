"""Examples: what a model reads, tokenised or decoded once; and what `prepare` hands back."""
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from slimtune.data.imagerows import ImageRows
from slimtune.data.spec import DataSpec
from slimtune.errors import DataError
from slimtune.io.models import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = logging.getLogger("slimtune")
IGNORED = -100
"""The label of a position that is not scored: the default `ignore_index` of torch's cross-entropy."""
Row = dict[str, Any]
Collate = Callable[[Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Examples(Dataset[Row]):
    """Encoded examples of one split: input_ids, attention_mask, labels ..., of their own lengths; or images.

    Example:
        >>> rows = Examples("train", [{"input_ids": [1, 2], "labels": 0}])
        >>> len(rows), rows[0]["labels"]
        (1, 0)
    """

    name: str
    rows: Sequence[Row] = field(repr=False)
    cut: int = 0
    """Texts that were longer than max_length and lost their end."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """The rows of a batch, as torch's loaders ask for them: images that are on disk are decoded together."""
        return self.rows.take(indices) if isinstance(self.rows, ImageRows) else [self.rows[i] for i in indices]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentation the rows have."""
        if isinstance(self.rows, ImageRows):
            self.rows.epoch = epoch

    def seed(self, seed: int) -> None:
        """Whose augmentation the rows have."""
        if isinstance(self.rows, ImageRows):
            self.rows.seed = seed

    def plain(self, count: int) -> "Examples":
        """The first rows, without augmentation."""
        return Examples(self.name, self.rows.plain(count) if isinstance(self.rows, ImageRows) else self.rows[:count])

    @property
    def tokens(self) -> int:
        """Tokens read in one pass over the split, padding not counted; 0 for images."""
        return 0 if isinstance(self.rows, ImageRows) else sum(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for a model and a loader.

    problem: what a sequence classifier's config calls `problem_type`, or the task itself.
    collate: a batch of rows -> tensors padded on the right to the longest; labels padded with -100.
    """

    task: Task
    train: Examples | None
    validation: Examples | None
    test: Examples | None
    label_names: tuple[str, ...]
    num_labels: int
    problem: str
    collate: Collate = field(repr=False)
    images: dict[str, Any] | None = None
    """How images were made into batches, and which could not be decoded; None for texts."""


def make_ready(tokenizer: "Tokenizer", spec: DataSpec) -> None:
    """Pad on the right, with a token that exists, and refuse lengths that the model cannot read.

    Errors: DataError.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a padding nor an end token; nothing can be batched.",
                            "Set one: tokenizer.pad_token = ...")
        tokenizer.pad_token = tokenizer.eos_token
        log.warning("the tokenizer has no padding token: %r, its end token, pads (masked, and never a label)",
                    tokenizer.eos_token)
    tokenizer.padding_side = "right"
    longest = max(spec.max_length, spec.max_target_length or 0)
    if longest > tokenizer.model_max_length:
        raise DataError(f"data.max_length: {longest} tokens, but the model reads at most "
                        f"{tokenizer.model_max_length}.",
                        f"Set data.max_length={tokenizer.model_max_length} or less.")


def tokenise(tokenizer: "Tokenizer", texts: Sequence[Any], max_length: int,
             **options: Any) -> tuple[list[Row], Any]:
    """One row of input_ids, attention_mask ... a text, cut to max_length; and the encoding itself."""
    encoding = tokenizer(list(texts), truncation=True, max_length=max_length, **options)
    keys = [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in encoding]
    columns = [encoding[key] for key in keys]
    return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)], encoding


def count_cut(encoding: Any) -> int:
    """How many texts of an encoding lost their end; 0 where a slow tokenizer does not tell."""
    return sum(bool(one.overflowing) for one in encoding.encodings or ())

