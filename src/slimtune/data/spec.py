"""DataSpec: what a run reads. The `data:` node of a recipe."""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slimtune.io.models import Task

Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: _as_text(names))]
SPLITS = ("train", "validation", "test")
LABELLED = ("classification", "image_classification")
"""Tasks whose examples have one class each."""
MULTI_LABEL = "multi_label_image_classification"
IMAGES = ("image_classification", MULTI_LABEL)
ONLY_IMAGES = ("image", "path", "layout", "stage", "size", "resize", "normalize", "augment", "corrupt")


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
        "causal_lm, seq2seq, image_classification, or multi_label_image_classification (any number of labels an image)")
    dataset: str | None = Field(default=None,
        description="a packaged set (`drugreview`, `digits`); with source=datasets, the name or folder of a set of the "
        "`datasets` library. train, validation and test are then names of its splits")
    train: str | None = Field(default=None,
        description="file of the training examples: .csv .tsv .jsonl .json .parquet, or .txt (paragraphs); or "
        "NAME:SPLIT of a packaged set or, with source=datasets, of a set. For images also a folder or .zip with a "
        "folder for each class, .npz, IDX (ubyte, .gz), or .txt with 'path label' a line")
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
        description="column of the label, of the number (regression) or of the tags; of several labels: a list, or "
        "one text with commas between them")
    image: str = Field(default="image", description="column of the image in a table: its path, or its bytes")
    path: str | None = Field(default=None,
        description="folder that relative names of images and of their files are taken from; with layout, the set's "
        "own folder")
    layout: Literal["vtab", "fgvc", "elevater"] | None = Field(default=None,
        description="a published layout of image files and split lists, in the folder `path`; it names the splits")
    stage: Literal["choose", "final"] = Field(default="final",
        description="with layout: choose trains on the smaller split, scores on validation and never reads test; "
        "final trains as the benchmark's last run does and scores on test")
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
    train_size: int | None = Field(default=None, ge=1,
        description="use only this many examples of train, as many of each class as can be, drawn with the seed; a "
        "validation split that is cut off train comes out of these (classification, image_classification)")
    test_size: int | None = Field(default=None, ge=1, description="as train_size, of test")
    shots: int | None = Field(default=None, ge=1,
        description="use only this many examples of each class of train, drawn with the seed")
    test_fraction: float = Field(default=0.0, ge=0.0, le=0.5,
        description="share of train held out for test when none is given, before anything else is drawn, in "
        "proportion to the labels")
    validation_fraction: float = Field(default=0.1, ge=0.0, le=0.5,
        description="share of train held out for validation when none is given, in proportion to the labels; "
        "0 for none")
    size: int | None = Field(default=None, ge=1,
        description="height and width of an image as the model gets it; by default what its preprocessor says")
    resize: Literal["model", "square", "crop"] = Field(default="model",
        description="square: both sides to size, whatever the aspect; crop: the short side to 8/7 of size and the "
        "centre cut out; model: as the model's preprocessor does, or square without one")
    normalize: Literal["model", "imagenet", "half", "none"] = Field(default="model",
        description="means and deviations of the colours, in 0 to 1: the preprocessor's, ImageNet's, 0.5 and 0.5, or "
        "0 and 1; model without a preprocessor is imagenet")
    augment: tuple[Literal["flip", "crop"], ...] = Field(default=(),
        description="of training images, another each epoch: flip mirrors half of them, crop takes a random place of "
        "the image at 8/7 of size")
    corrupt: Literal["refuse", "skip"] = Field(default="refuse",
        description="images that cannot be decoded: refuse them all before training, by name, or leave them out")
    seed: int = Field(default=0, ge=0, description="seed of limit, train_size, test_size, shots and of the splits")
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
        if not (self.train or self.test or self.dataset or self.layout):
            raise ValueError("give train, test, dataset or layout: there is nothing to read")
        if self.header and self.columns is not None:
            raise ValueError("columns is for files without a header: set header=false too, or leave it out")
        if not self.header and not self.columns:
            raise ValueError("a file without a header needs columns, for instance columns=[text,label]")
        if self.pair is not None and self.task not in ("classification", "regression"):
            raise ValueError(f"pair is for classification and regression, not for {self.task}")
        _check_images(self)
        for field in ("labels", "columns"):
            names = getattr(self, field)
            if names is not None and (not names or len(set(names)) < len(names)):
                raise ValueError(f"{field} must be one or more different names")
        return self


def _check_images(spec: DataSpec) -> None:
    """What concerns images alone, and how they and their labels are drawn."""
    if spec.task not in IMAGES:
        given = [key for key in ONLY_IMAGES if key in spec.model_fields_set
                 and getattr(spec, key) != DataSpec.model_fields[key].default]
        if given:
            raise ValueError(f"{given[0]} is for image_classification, not for {spec.task}")
    if spec.task not in LABELLED:
        able = ("shots", "test_fraction") if spec.task == MULTI_LABEL else ()
        drawn = [key for key in ("train_size", "test_size", "shots", "test_fraction")
                 if getattr(spec, key) and key not in able]
        if drawn:
            raise ValueError(f"{drawn[0]} draws by class: it is for {' and '.join(LABELLED)}, not for {spec.task}")
    sizes = [key for key in ("limit", "train_size", "shots") if getattr(spec, key) is not None]
    if len(sizes) > 1:
        raise ValueError(f"{sizes[0]} and {sizes[1]} both say how much of train is used: give one")
    if spec.layout and spec.path is None:
        raise ValueError("layout needs path, the folder of the set")
    if spec.layout and (spec.train or spec.validation or spec.test or spec.dataset):
        raise ValueError("layout names the splits by itself: leave out train, validation, test and dataset")
    if spec.stage != "final" and not spec.layout:
        raise ValueError("stage is of a layout: give layout too, or leave it out")
    if len(set(spec.augment)) < len(spec.augment):
        raise ValueError("augment names something twice")
