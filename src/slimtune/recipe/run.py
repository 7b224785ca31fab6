"""run: from a recipe to a finished run folder, resumable at any moment."""
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from slimtune.core import Delta, attach
from slimtune.core.load import load_delta
from slimtune.data import prepare
from slimtune.data.examples import Prepared
from slimtune.data.metrics import Score
from slimtune.data.spec import IMAGES, MULTI_LABEL
from slimtune.errors import RecipeError, listing, suggest
from slimtune.io.models import load_model
from slimtune.methods import to_config
from slimtune.objectives.distillation import Teacher
from slimtune.recipe.card import card
from slimtune.recipe.digest import digest, judged
from slimtune.recipe.env import environment, version
from slimtune.recipe.folder import (
    CARD,
    DELTA,
    ENV,
    RESULT,
    begun,
    check_folder,
    read_json,
    write_json,
    write_text,
)
from slimtune.recipe.reader import by_length, reader
from slimtune.recipe.scoring import finite, scores_of, scoring
from slimtune.recipe.teacher import teacher
from slimtune.recipe.tree import Recipe
from slimtune.train import TrainResult, fit, predict
from slimtune.train.predict import Step
from slimtune.train.pruning import check_pruning

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """A finished run. values: what result.json holds; again: it was finished before, and nothing was done."""

    folder: Path
    values: dict[str, Any]
    again: bool = False

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """{split: {metric: value}}."""
        return self.values["metrics"]


@dataclass(frozen=True)
class Parts:
    """What a run works with."""

    model: nn.Module
    tokenizer: Any
    data: Prepared
    delta: Delta
    score: Score
    step: Step
    teacher: Teacher | None = None


def run(recipe: Recipe, *, resume: Literal["auto", False] = "auto", report: Report | None = None) -> Result:
    """Train, evaluate on the test split, and save everything in the run's folder.

    The folder gets recipe.yaml (resolved), env.json, metrics.jsonl, checkpoint-<step>/, delta/, card.md and at last
    result.json. A run that was stopped goes on from its newest checkpoint, bitwise; a finished one is not run
    again. `predictions_sha256` of result.json digests the predictions that were scored.

    report: see `slimtune.train.fit`. Errors: RecipeError for a folder that holds something else, DataError,
    MethodError, SiteError (nothing is written then); TrainError; Interrupted when told to stop.
    """
    start = time.monotonic()
    check_folder(recipe, resume == "auto")
    if (recipe.folder / RESULT).is_file():
        return Result(recipe.folder, read_json(recipe.folder / RESULT), again=True)
    parts = load(recipe)
    with begun(recipe, resume == "auto"):
        write_json(recipe.folder / ENV, environment())
        trained = fit(parts.delta, parts.data.train, parts.data.validation, parts.data.collate, parts.score,
                      recipe.train, recipe.folder, report=report, step=parts.step, privacy=recipe.privacy,
                      pruning=recipe.prune, objective=parts.teacher)
        return _finish(recipe, parts, trained, start)


def load(recipe: Recipe) -> Parts:
    """Tokenizer (or transform), data, model and delta of a recipe, ready to train."""
    spec = recipe.data
    tokenizer = reader(recipe.model, spec)
    if spec.augment and recipe.train.cache:
        raise RecipeError("data.augment: images that are another each epoch cannot be cached.",
                          "Leave out data.augment or train.cache.")
    data = prepare(spec, tokenizer)
    if data.train is None:
        raise RecipeError("data.train: is missing; there is nothing to train on.", "Give data.train or data.dataset.")
    data.train.seed(recipe.train.seed)
    _check_best(recipe, data)
    model = load_model(recipe.model, spec.task, label_names=data.label_names, seed=recipe.seed)
    delta = attach(model, recipe.method, recipe.delta_name, seed=recipe.seed)
    delta.info.update(about(recipe, data.label_names, data.images))
    check_pruning(delta, recipe.prune, recipe.train, recipe.privacy is not None)
    score, step = scoring(spec, data.label_names, tokenizer)
    return Parts(model, tokenizer, data, delta, score, step, teacher(recipe, data.label_names))


def about(recipe: Recipe, labels: Sequence[str], images: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a delta's file says of its use."""
    spec = recipe.data
    told = {"task": spec.task, "labels": list(labels), "model": recipe.model}
    if spec.task in IMAGES:
        return told | ({"images": dict(images)} if images else {})
    told |= {"max_length": spec.max_length, "text": spec.text}
    extra = {"pair": spec.pair, "target": spec.target if spec.task == "seq2seq" else None,
             "max_target_length": spec.max_target_length}
    return told | {key: value for key, value in extra.items() if value is not None}


_MEASURED = {"classification": ("accuracy", "macro_f1", "matthews"), "regression": ("pearson", "spearman", "mse"),
             "token_classification": ("accuracy", "token_f1", "entity_f1"), "seq2seq": ("bleu", "chrf", "rougeL"),
             "causal_lm": ("perplexity", "token_loss"),
             "image_classification": ("accuracy", "class_accuracy", "macro_f1", "roc_auc"),
             MULTI_LABEL: ("map_11", "map", "macro_f1")}


def _check_best(recipe: Recipe, data: Prepared) -> None:
    """Said before training, not at the first evaluation."""
    best = recipe.train.best
    if best is None:
        return
    if data.validation is None:
        raise RecipeError("train.best: there is no validation data to choose by.",
                          "Give data.validation, set data.validation_fraction, or leave train.best out.")
    known = ("loss", *_MEASURED[data.task])
    if best.removeprefix("eval_") not in known:
        raise RecipeError(f"train.best: {data.task} has no metric '{best}'.", f"It has: {listing(known)}",
                          suggest(best, known))


def _finish(recipe: Recipe, parts: Parts, trained: TrainResult, start: float) -> Result:
    """Save the delta, load it back, score that, and write what is known of the run; result.json last."""
    folder, data = recipe.folder, parts.data
    counts = parts.delta.count()
    parts.delta.save(folder / DELTA)
    if any(method.final(slots) is not None for method, slots in parts.delta.by_method()):
        parts.delta.detach()  # a reparametrisation is not saved: what is scored is what the file holds
        load_delta(parts.model, folder / DELTA)
    saved = time.monotonic()
    split, examples = judged(data)
    found = predict(parts.model, examples, data.collate, recipe.train.eval_batch_size, step=parts.step,
                    by_length=by_length(recipe.data), precision=recipe.train.precision)
    scores = {"validation": finite(trained.metrics)} if trained.metrics else {}
    if split == "test":
        scores["test"] = finite(scores_of(found, parts.score))
    ended = time.monotonic()
    splits = {name: split for name in ("train", "validation", "test") if (split := getattr(data, name)) is not None}
    values = {
        "slimtune": version("slimtune"), "name": recipe.name, "task": data.task, "model": recipe.model,
        "method": [to_config(method) for method in recipe.method], "labels": list(data.label_names),
        "counts": counts.as_dict(), "percent": counts.percent, "metrics": scores,
        "predictions_sha256": digest(found),
        "examples": {name: len(split) for name, split in splits.items()},
        "cut": {name: split.cut for name, split in splits.items()},
        **({} if data.images is None else {"images": data.images}),
        "selection": f"best {recipe.train.best} on validation" if recipe.train.best else "last step",
        "steps": trained.steps, "epochs": trained.epochs,
        "best_step": trained.best.name.rpartition("-")[2] if trained.best else None,
        "resumed_from": trained.resumed_from.name if trained.resumed_from else None,
        "stopped_early": trained.stopped_early, "privacy": trained.privacy,
        "sparsity": (parts.delta.info.get("sparsity") or [None])[-1],
        "seconds": {"train": trained.seconds, "test": ended - saved, "all": ended - start},
        "peak_memory": trained.peak_memory_mb, "added_memory": trained.added_memory_mb,
        "files": {DELTA: sum(p.stat().st_size for p in (folder / DELTA).iterdir()),
                  **{p.name: p.stat().st_size for p in sorted((folder / DELTA).iterdir())}},
        "units": {"seconds": "s, of the last process", "peak_memory": "MiB, resident, highest while training",
                  "added_memory": "MiB, above that at the start of training", "files": "bytes"},
    }
    write_text(folder / CARD, card(recipe, values, read_json(folder / ENV)))
    write_json(folder / RESULT, values)
    return Result(folder, values)
