"""DataSpec: what a run reads. The `data:` node of a recipe."""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slimtune.io.models import Task

Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: _as_text(names))]
SPLITS = ("train", "validation", "test")


def _as_text(names: object) -> object:
    """YAML reads `labels: [0, 1]` as integers; labels are text here."""
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else names


class DataSpec(BaseModel):
    """Where the examples are, which columns hold them, and how they are cut and split.

    Example:
        >>> DataSpec(task="classification", train="train.csv", label="category").max_length
        128
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    task: Task = Field(
        description="what is learnt: classification (of a text or a pair), regression, token_classification, "
        "causal_lm or seq2seq")
    dataset: str | None = Field(default=None,
        description="a packaged set (`drugreview`); with source=datasets, the name or folder of a set of the "
        "`datasets` library. train, validation and test are then names of its splits")
    train: str | None = Field(default=None,
        description="file of the training examples: .csv .tsv .jsonl .json .parquet, or .txt (paragraphs); or "
        "NAME:SPLIT of a packaged set or, with source=datasets, of a set")
    validation: str | None = Field(default=None, description="as train, for the split that chooses and stops")
    test: str | None = Field(default=None,
        description="as train, for the split that is scored once, at the end")
    source: Literal["files", "datasets"] = Field(default="files",
        description="who reads: slimtune, or the `datasets` library (a local folder, or a name; from its "
        "cache alone when HF_HUB_OFFLINE=1)")
    text: str = Field(default="text",
        description="column of the text; for token_classification of the words (a list, or one string with "
        "spaces between them)")
    pair: str | None = Field(default=None,
        description="column of the second text of a pair (classification, regression)")
    label: str = Field(default="label",
        description="column of the label, of the number (regression) or of the tags")
    target: str = Field(default="target", description="column of the text to generate (seq2seq)")
    labels: Names | None = Field(default=None,
        description="label names in the order of the model's outputs; by default those of the training data, "
        "sorted (by value if all are integers)")
    max_length: int = Field(default=128, ge=4,
        description="tokens a text (or pair) is cut to, special tokens included; length of a block when "
        "packing")
    max_target_length: int | None = Field(default=None, ge=2,
        description="tokens a target is cut to; by default max_length")
    pack: bool = Field(default=True,
        description="causal_lm: join all texts, an end token after each, and cut blocks of max_length; "
        "otherwise one text an example")
    limit: int | None = Field(default=None, ge=1,
        description="use only this many examples of train, drawn with the seed; a validation split that is "
        "cut off train comes out of these")
    validation_fraction: float = Field(default=0.1, ge=0.0, le=0.5,
        description="share of train held out for validation when none is given, in proportion to the labels; "
        "0 for none")
    seed: int = Field(default=0, ge=0, description="seed of limit and of the validation split")
    allow_empty: bool = Field(default=False, description="accept texts that are empty or blank")
    encoding: str = Field(default="utf-8", description="encoding of text files")
    delimiter: str | None = Field(default=None, min_length=1, max_length=1,
        description="between fields; by default a comma in .csv, a tab in .tsv")
    quoting: bool | None = Field(default=None,
        description='whether "..." may enclose a field; by default yes in .csv, no in .tsv')
    header: bool = Field(default=True,
        description="whether the first line of a .csv or .tsv names the columns")
    columns: Names | None = Field(default=None, description="names of the columns of a file without a header")

    @model_validator(mode="after")
    def _consistent(self) -> "DataSpec":
        if not (self.train or self.test or self.dataset):
            raise ValueError("give train, test or dataset: there is nothing to read")
        if self.header and self.columns is not None:
            raise ValueError("columns is for files without a header: set header=false too, or leave it out")
        if not self.header and not self.columns:
            raise ValueError("a file without a header needs columns, for instance columns=[text,label]")
        if self.pair is not None and self.task not in ("classification", "regression"):
            raise ValueError(f"pair is for classification and regression, not for {self.task}")
        for field in ("labels", "columns"):
            names = getattr(self, field)
            if names is not None and (not names or len(set(names)) < len(names)):
                raise ValueError(f"{field} must be one or more different names")
        return self
