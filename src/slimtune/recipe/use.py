"""evaluate_run and predict_run: what is done with a finished run, in any process, with the same results."""
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.core.load import load_delta
from slimtune.core.manifest import read_manifest
from slimtune.data import DataSpec, prepare
from slimtune.data.columns import word_column
from slimtune.data.examples import Examples
from slimtune.data.imagerows import ImageRows
from slimtune.data.imagetables import TABLES, pictures, read_images
from slimtune.data.spec import IMAGES, MULTI_LABEL
from slimtune.data.tables import Table, read_table, read_text
from slimtune.data.tasks import FAMILIES, prepare_unlabelled
from slimtune.errors import DataError, RecipeError, listing
from slimtune.io.models import load_model
from slimtune.recipe.digest import digest, judged
from slimtune.recipe.folder import DELTA, RECIPE, open_run
from slimtune.recipe.parse import read_recipe
from slimtune.recipe.reader import by_length, reader
from slimtune.recipe.scoring import scoring, tell
from slimtune.recipe.tree import Recipe
from slimtune.train import evaluate, predict


@dataclass(frozen=True)
class Tuned:
    """A finished run, loaded: the model with its delta on."""

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]


def load_run(folder: Path | str) -> Tuned:
    """The model and delta of a run. Errors: RecipeError for no run, DeltaError for a delta that does not verify."""
    path, recipe = open_run(folder)
    labels = tuple(read_manifest(path / DELTA).get("info", {}).get("labels") or ())
    tokenizer = reader(recipe.model, recipe.data)
    model = load_model(recipe.model, recipe.data.task, label_names=labels, seed=recipe.seed)
    load_delta(model, path / DELTA)
    return Tuned(recipe, model, tokenizer, labels)


def evaluate_run(folder: Path | str, data: Sequence[str] = ()) -> tuple[str, int, dict[str, float]]:
    """(split, examples, metrics) of a run on its test split, or on its validation split when it has no test.

    data: overrides of the recipe's data, such as `data.test=new.csv`. Errors: RecipeError, DataError.
    """
    path, _ = open_run(folder)
    for text in data:
        if not text.startswith(("data.", "train.eval_batch_size=")):
            raise RecipeError(f"override {ascii(text)[:100]}: a trained run takes only new data.",
                              "For example: data.test=new.csv data.limit=100")
    recipe = read_recipe(path / RECIPE, data)
    tuned = load_run(folder)
    spec = recipe.data
    changes: dict[str, Any] = {"labels": tuned.labels or spec.labels}
    if spec.test is not None and spec.dataset is None:
        changes |= {"train": None, "validation": None}
    prepared = prepare(spec.model_copy(update=changes), tuned.tokenizer)
    name, examples = ("test", prepared.test) if prepared.test is not None else ("validation", prepared.validation)
    if examples is None:
        raise RecipeError(f"{path}: the recipe has neither test nor validation data.",
                          "Give some: data.test=new.csv")
    score, step = scoring(spec, tuned.labels, tuned.tokenizer)
    return name, len(examples), evaluate(tuned.model, examples, prepared.collate, score, recipe.train.eval_batch_size,
                                         step=step, by_length=by_length(spec), precision=recipe.train.precision)


def digest_run(folder: Path | str) -> str:
    """The digest of a run's predictions, made anew from its folder: equal to `predictions_sha256` of its result.json.

    Errors: RecipeError, DataError, DeltaError.
    """
    tuned = load_run(folder)
    prepared = prepare(tuned.recipe.data, tuned.tokenizer)
    _, step = scoring(tuned.recipe.data, tuned.labels, tuned.tokenizer)
    train = tuned.recipe.train
    return digest(predict(tuned.model, judged(prepared)[1], prepared.collate, train.eval_batch_size, step=step,
                          by_length=by_length(tuned.recipe.data), precision=train.precision))


def predict_run(folder: Path | str, source: Path | str | Iterable[str | dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Predictions of a run, one plain mapping an input; see `slimtune.recipe.scoring.tell`.

    source: a file with the columns of the recipe's data (a .txt file holds one text a line), or texts, or
    mappings with those columns. For images: an image, a folder or .zip of them, what the recipe could read, or paths;
    names in a list or table are taken from the recipe's data.path, else from its own folder.
    Errors: RecipeError, DataError, DeltaError.
    """
    _, recipe = open_run(folder)
    spec = recipe.data.model_copy(update={"pack": False})
    table = table_of(source, spec)
    tuned = load_run(folder)
    if spec.task in IMAGES:
        return _of_images(tuned, spec, table)
    examples = prepare_unlabelled(spec, tuned.tokenizer, table)
    words: Sequence[Any] = ()
    if spec.task == "token_classification":
        texts = word_column(table, spec.text, "text", spec.allow_empty)
        encoding = tuned.tokenizer(texts, truncation=True, max_length=spec.max_length, is_split_into_words=True)
        words = [(text, encoding.word_ids(i)) for i, text in enumerate(texts)]
    if spec.task == "seq2seq":  # the forward pass before generation needs a target, which nothing reads
        end = tuned.tokenizer.eos_token_id
        examples = Examples(examples.name, [{**row, "labels": [end]} for row in examples.rows])
    _, step = scoring(spec, tuned.labels, tuned.tokenizer)
    found = predict(tuned.model, examples, FAMILIES[spec.task].collator(tuned.tokenizer),
                    recipe.train.eval_batch_size, step=step, by_length=True, precision=recipe.train.precision)
    return tell(spec, tuned.labels, found, words)


def _of_images(tuned: Tuned, spec: DataSpec, table: Table) -> Iterator[dict[str, Any]]:
    """A line an image, in the order of the input; with data.corrupt=skip one that cannot be decoded says why."""
    rows = prepare_unlabelled(spec, tuned.tokenizer, table).rows
    assert isinstance(rows, ImageRows)
    names = [picture.name for picture in rows.pictures]
    bad = {error.picture: error.why for error in rows.bad}
    told: Iterator[dict[str, Any]] = iter(())
    if names:
        found = predict(tuned.model, Examples(table.name, rows), tuned.tokenizer.collate,
                        tuned.recipe.train.eval_batch_size, precision=tuned.recipe.train.precision)
        told = tell(spec, tuned.labels, found, names)
    said = "labels" if spec.task == MULTI_LABEL else "label"
    for picture in table.columns[spec.image]:
        yield {"image": picture.name, said: None, "why": bad[picture.name]} if picture.name in bad else next(told)


def table_of(source: Path | str | Iterable[str | dict[str, Any]], spec: DataSpec) -> Table:
    """The inputs as a table: a file's, or one made of texts or of mappings.

    Example:
        >>> table_of(["fine", "bad"], DataSpec(task="classification", test="x.csv", text="review")).columns
        {'review': ['fine', 'bad']}
    """
    if spec.task in IMAGES:
        return _table_of_images(source, spec)
    if isinstance(source, Path | str):
        path = Path(source).expanduser()
        if path.suffix.lower() != ".txt" or not path.is_file():
            return read_table(str(source), spec)
        return table_of(read_text(path, spec.encoding).splitlines(), spec)
    rows = [row if isinstance(row, dict) else {spec.text: row} for row in source]
    if not rows:
        raise DataError("there is no input to predict on.", "Give texts, one a line.")
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table("input", {key: [row.get(key) for row in rows] for key in keys}, list(range(1, len(rows) + 1)), "line")


def _table_of_images(source: Path | str | Iterable[str | dict[str, Any]], spec: DataSpec) -> Table:
    here = spec.model_copy(update={"path": None})  # the source is named from where one is, not from data.path
    if isinstance(source, Path | str):
        path = Path(source).expanduser()
        if path.suffix.lower() in (".txt", *TABLES):
            return read_images(str(path.absolute()), spec, "test", labelled=False)
        return read_images(str(path), here, "test", labelled=False)
    values = [row.get(spec.image) if isinstance(row, dict) else row for row in source]
    if not values:
        raise DataError("there is no input to predict on.", "Give images: slimtune predict RUN --image photo.jpg")
    return pictures(Table("input", {spec.image: values}, list(range(1, len(values) + 1)), "image"), here, Path())


def parse_lines(lines: Iterable[str]) -> list[str | dict[str, Any]]:
    """Lines of text, or of JSON objects if the first is one. Errors: DataError naming the line."""
    texts = [line.rstrip("\r\n") for line in lines]
    if not texts or not _is_object(texts[0]):
        return list(texts)
    for number, text in enumerate(texts, 1):
        if not _is_object(text):
            raise DataError(f"input, line {number}: not a JSON object, and the first line is one.",
                            f"It reads: {text[:60]!r}", f"Columns of the first: {listing(json.loads(texts[0]))}")
    return [json.loads(text) for text in texts]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
