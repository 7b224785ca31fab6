"""Methods on four real image sets at 1,000 training images each, on a real pretrained ViT, three seeds.

    python -m slimtune.bench.vision                             # every cell that is not done, and the page
    python -m slimtune.bench.vision --minutes 30                # as many as fit, seed by seed; run it again to go on
    python -m slimtune.bench.vision --sets cifar10 dtd10        # beside another process with the other two sets
    python -m slimtune.bench.vision --methods LoRA --sets cifar10 --validate 1e-3 3e-3   # rates, on held-out images
    python -m slimtune.bench.vision --page                      # the page alone

The images are those that recipes/cifar10.yaml and its neighbours name: --images FOLDER, else SLIMTUNE_IMAGES.
"""
import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.bench.results import record, recorded
from slimtune.bench.vision_page import page
from slimtune.bench.vision_settings import (
    BUDGET,
    HELD_OUT,
    MODEL,
    SEEDS,
    SETS,
    SETTINGS,
    SIZE,
    TRAIN,
    Setting,
)
from slimtune.core import attach
from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.examples import Prepared
from slimtune.data.transform import transform_of
from slimtune.errors import DataError, SlimtuneError, listing, suggest
from slimtune.io.images import load_image_input
from slimtune.io.models import load_model
from slimtune.methods import get
from slimtune.methods import names as method_names
from slimtune.recipe.folder import write_text
from slimtune.train import fit, predict

OUT, DOC = Path("benchmarks/results/vision_learning.json"), Path("docs/vision.md")
IMAGES = os.environ.get("SLIMTUNE_IMAGES", "../shared/data/image")
Cell = tuple[int, str, str]
"""Seed, set, title of a method."""


@dataclass(frozen=True)
class Ground:
    """The backbone with a new head, and one draw of a set; a delta that is detached leaves the model as it was."""

    model: nn.Module
    data: Prepared
    seed: int


def spec_of(name: str, seed: int, images: str, held_out: float = 0.0) -> DataSpec:
    """One draw of a set: 1,000 training images, as many of each class."""
    return DataSpec(task="image_classification", path=images, train_size=TRAIN, seed=seed, size=SIZE, resize="square",
                    validation_fraction=held_out, **SETS[name])


def load(name: str, seed: int, images: str, held_out: float = 0.0) -> Ground:
    """Errors: DataError when the set is not there, SlimtuneError when the model is not."""
    spec = spec_of(name, seed, images, held_out)
    data = prepare(spec, transform_of(spec, load_image_input(MODEL)))
    return Ground(load_model(MODEL, spec.task, label_names=data.label_names, seed=seed), data, seed)


def learn(setting: Setting, ground: Ground) -> dict[str, Any]:
    """Train in the budget, and score on test, or on what is held out of train."""
    start = time.monotonic()
    delta = attach(ground.model, get(setting.method)(**setting.values), "vision", seed=ground.seed)
    spec = BUDGET.model_copy(update={"learning_rate": setting.rate, "head_learning_rate": setting.head,
                                     "epochs": setting.epochs, "cache": setting.cache, "seed": ground.seed})
    try:
        with tempfile.TemporaryDirectory() as folder:
            trained = fit(delta, ground.data.train, None, ground.data.collate, None, spec, folder)
        judged = ground.data.validation or ground.data.test
        found = predict(ground.model, judged, ground.data.collate, precision=spec.precision)
        counts = delta.count()
    finally:
        delta.detach()
    losses = [line["loss"] for line in trained.history if "loss" in line]
    return {"accuracy": metrics("image_classification")(found.predictions, found.references)["accuracy"],
            "trained": counts.adapter + counts.norms, "head": counts.head, "train_loss": losses[-1],
            "examples": {"train": len(ground.data.train or ()), "judged": len(found.predictions)},
            "seconds": round(time.monotonic() - start, 1)}


def cells(seeds: Iterable[int], sets: Iterable[str], titles: Iterable[str]) -> Iterator[Cell]:
    """The whole grid, seed by seed, so that a part of it is a whole grid of fewer seeds."""
    sets, titles = list(sets), list(titles)
    return ((seed, name, title) for seed in seeds for name in sets for title in titles)


def budget() -> dict[str, Any]:
    """What every cell gets, as the results hold it."""
    return {"model": MODEL, "size": SIZE, "train_size": TRAIN, "sets": SETS,
            "train": BUDGET.model_dump(mode="json", exclude={"learning_rate", "head_learning_rate", "seed"})}


def read(path: Path) -> dict[str, Any]:
    """The results on disk, a cell and a tried rate kept only if its setting is the present one.

    Errors: SlimtuneError for those of another budget.
    """
    found = recorded(path, "budget", budget(), cells={}, validation={})
    found["cells"] = {key: cell for key, cell in found["cells"].items()
                      if cell["setting"] == said(SETTINGS.get(key.split("/")[1]))}
    found["validation"] = {title: {name: _now(title, scores) for name, scores in sets.items()}
                           for title, sets in found["validation"].items()}
    return found


def said(setting: Setting | None) -> dict[str, Any] | None:
    """A setting as JSON has it."""
    return None if setting is None else json.loads(json.dumps(setting.__dict__))


def _now(title: str, scores: dict[str, Any]) -> dict[str, Any]:
    """The scores of tried rates whose setting is the present one; a bare number does not say its own."""
    return {rate: score for rate, score in scores.items()
            if isinstance(score, dict) and score["setting"] == said(tried(title, rate))}


def tried(title: str, rate: str) -> Setting | None:
    """The present setting of a title with another rate; a linear probe's is that of its head."""
    own = SETTINGS.get(title)
    return own and replace(own, rate=float(rate), head=float(rate) if own.method == "linear_probe" else own.head)


def known(titles: Iterable[str]) -> list[str]:
    """The titles whose methods there are; others are said and skipped. Errors: SlimtuneError for an unknown title."""
    found = []
    for title in titles:
        if title not in SETTINGS:
            raise SlimtuneError(f"the vision benchmark has no '{title}'.", f"It has: {listing(SETTINGS)}",
                                suggest(title, SETTINGS))
        if SETTINGS[title].method in method_names():
            found.append(title)
        else:
            print(f"{title}: there is no method '{SETTINGS[title].method}'; skipped", flush=True)
    return found


def main() -> None:
    """Run, keep each cell as it comes, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), metavar="TITLE")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, help="begin no cell after this time")
    parser.add_argument("--validate", type=float, nargs="+", metavar="RATE", help="try rates on held-out train images")
    parser.add_argument("--images", default=IMAGES, help="folder of the four sets")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    found = read(options.out)
    titles = known(options.methods)
    if options.validate:
        validate(titles, options, found)
    elif not options.page:
        _run(cells(options.seeds, options.sets, titles), options, found)
    if found["cells"]:
        write_text(options.doc, page(found, options.doc.read_text() if options.doc.is_file() else ""))


def _run(todo: Iterable[Cell], options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Every cell that has no result yet; a set that is not there is said and skipped."""
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    ground, at, missing = None, None, set()
    for seed, name, title in todo:
        key = f"{name}/{title}/{seed}"
        if key in found["cells"] or name in missing:
            continue
        if time.monotonic() > until:
            print("the time is up; run it again to go on", flush=True)
            return
        if at != (seed, name):
            try:
                ground, at = load(name, seed, options.images), (seed, name)
            except DataError as error:
                print(f"{name}: skipped: {error.what}", flush=True)
                missing.add(name)
                continue
        assert ground is not None
        cell = learn(SETTINGS[title], ground) | {"setting": said(SETTINGS[title])}
        print(key, {k: v for k, v in cell.items() if k != "setting"}, flush=True)
        found |= read(options.out)     # another process may have added its own
        found["cells"][key] = cell
        record(options.out, found)


def validate(titles: list[str], options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The accuracy of each rate on a fifth of the training images of the first seed."""
    for name in options.sets:
        ground = load(name, SEEDS[0], options.images, HELD_OUT)
        for title in titles:
            for rate in options.validate:
                setting = tried(title, f"{rate:g}")
                assert setting is not None
                score = learn(setting, ground)
                print(name, title, rate, score["accuracy"], score["train_loss"], score["seconds"], flush=True)
                found |= read(options.out)     # another process may have added its own
                own = found["validation"].setdefault(title, {}).setdefault(name, {})
                own[f"{rate:g}"] = {"accuracy": score["accuracy"], "setting": said(setting)}
                record(options.out, found)


if __name__ == "__main__":
    main()
