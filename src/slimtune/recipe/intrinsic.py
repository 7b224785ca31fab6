"""search_intrinsic: the local intrinsic dimension of a recipe's submodules, in a folder that it can be resumed from.

The folder is the recipe's with `-intrinsic` behind its name: recipe.yaml, env.json, intrinsic.json. Each training's
score is written there when it is known; a search that was stopped goes on behind the last.
"""
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

from slimtune.core import attach, dissect
from slimtune.data.metrics import PRIMARY
from slimtune.errors import RecipeError, SlimtuneError, listing
from slimtune.methods import from_config, get
from slimtune.recipe.env import environment, version
from slimtune.recipe.folder import ENV, begun, check_folder, read_json, write_json
from slimtune.recipe.run import Parts, load
from slimtune.recipe.tree import Recipe
from slimtune.search.intrinsic import (
    ROLES,
    Measured,
    Part,
    Search,
    Trials,
    lowest,
    measure,
    name_of,
    parts,
    ranked,
    together,
)

FILE = "intrinsic.json"
HELD = 0.1
"""Share of train that is held out where a recipe has no validation data: test is never what is searched by."""
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Found:
    """A finished search. table: by dimension; proposal: a method as the command line takes it, or an empty text.

    trainings: how many this call ran; values: what intrinsic.json holds.
    """

    folder: Path
    table: list[Measured]
    proposal: str
    trainings: int
    values: dict[str, Any]


def search_intrinsic(recipe: Recipe, search: Search, sites: Sequence[str] = (), *, per_block: bool = False,
                     steps: int = 100, learning_rate: float = 1e-4, report: Report | None = None) -> Found:
    """Measure each part by trainings of `steps`, and propose where KAdaptation should go.

    learning_rate: of a weight, see `slimtune.search.intrinsic`; the head has the recipe's. report: is called with
    {"event": "plan", "head", "parts", "most", "known"} before the first training, and with {"event": "training",
    "part", "d", "score", "seconds"} behind each. Errors: RecipeError, DataError, SiteError, SlimtuneError: nothing is
    written then; TrainError; Interrupted when told to stop.
    """
    recipe = _prepared(recipe)
    check_folder(recipe, True)
    loaded = load(recipe)
    if loaded.data.validation is None:
        raise RecipeError("a search needs validation data, and this recipe's data has none.",
                          "Give data.validation, or data.stage=choose for a published layout.")
    loaded.delta.detach()
    trials = _trials(recipe, loaded, steps, learning_rate)
    search.check(trials.higher)
    anatomy = dissect(loaded.model)
    chosen = parts(anatomy, sites or [r for r in ROLES if r in anatomy.roles], per_block)
    search_by = {"metric": trials.metric, "steps": steps, "learning_rate": learning_rate}
    with begun(recipe, True):
        book = _Book(recipe.folder / FILE, search_by, trials, report or (lambda event: None))
        write_json(recipe.folder / ENV, environment())
        book.report({"event": "plan", "parts": [p.name for p in chosen], "known": len(book.scores),
                     "most": 1 + (search.against == "run") + sum(search.tries(p) for p in chosen), "steps": steps})
        head, all_parts = book.head(), together(anatomy, chosen)
        whole = book.part(all_parts, all_parts.numbers) if search.against == "run" else None
        table = ranked([measure(part, book.part, head, search, trials.higher, whole) for part in chosen])
        proposal = propose(loaded, lowest(table))
        values = {"slimtune": version("slimtune"), "model": recipe.model, **search_by, "search": asdict(search),
                  "validation": len(loaded.data.validation), "trainings": book.scores, "head": head,
                  "parts": [_row(m) for m in table], "proposal": proposal}
        write_json(recipe.folder / FILE, values)
        shutil.rmtree(trials.folder, ignore_errors=True)
    return Found(recipe.folder, table, proposal, book.ran, values)


def propose(loaded: Parts, sites: Sequence[Part]) -> str:
    """KAdaptation on these parts, with the largest division up to its own that fits; empty without parts.

    Checked by attaching it.
    """
    if not sites:
        return ""
    names = [part.name for part in sites]
    places = dissect(loaded.model).select(names)
    usual = get("kadaptation").model_fields["division"].default
    width = gcd(*(w for s in places for w in (s.d_in, s.d_out)))
    division = max(n for n in range(1, usual + 1) if width % n == 0)
    method = {"name": "kadaptation", "sites": names, "division": division}
    attach(loaded.model, from_config(method), "proposal").detach()
    more = "" if division == usual else f", division: {division}"
    return f"method={{name: kadaptation, sites: [{', '.join(names)}]{more}}}"


def _prepared(recipe: Recipe) -> Recipe:
    """The recipe with a folder of the search's own, and with validation data."""
    if recipe.privacy is not None:
        raise RecipeError("privacy: a search trains many times without it, and its result would tell of the data.",
                          "Search on public data, or leave privacy out.")
    data = recipe.data
    if not data.validation_fraction:
        data = data.model_copy(update={"validation_fraction": HELD})
    return recipe.model_copy(update={"output": f"{recipe.output.rstrip('/')}-intrinsic", "data": data})


def _trials(recipe: Recipe, loaded: Parts, steps: int, learning_rate: float) -> Trials:
    spec, data = recipe.train, loaded.data
    metric = (spec.best or PRIMARY[data.task]).removeprefix("eval_")
    train = spec.model_copy(update={
        "steps": steps, "learning_rate": learning_rate, "eval_every": steps, "save_every": None, "keep": 1,
        "head_learning_rate": spec.head_learning_rate or spec.learning_rate, "cache": False,
        "best": None, "best_mode": None, "patience": None})
    return Trials(loaded.model, data.train, data.validation, data.collate, loaded.score, loaded.step, metric, train,
                  recipe.folder / "trainings", recipe.seed)


class _Book:
    """The scores that are known, by training; another is trained, and written down."""

    def __init__(self, path: Path, search_by: dict[str, Any], trials: Trials, report: Report) -> None:
        self.path, self.search_by, self.trials, self.report, self.ran = path, search_by, trials, report, 0
        self.scores: dict[str, float] = {}
        if path.is_file():
            told = read_json(path)
            other = [k for k, v in search_by.items() if told.get(k) != v]
            if other:
                raise RecipeError(f"{path.parent} holds a search with another {listing(other)}: "
                                  f"{listing(str(told.get(k)) for k in other)}.", "Choose another folder: output=...")
            self.scores = dict(told.get("trainings", {}))

    def head(self) -> float:
        return self._known("head", "head", 0, self.trials.head)

    def part(self, part: Part, d: int) -> float:
        return self._known(name_of(part, d), part.name, d, lambda: self.trials.part(part, d))

    def _known(self, name: str, part: str, d: int, train: Callable[[], float]) -> float:
        if name not in self.scores:
            started = time.monotonic()
            score = train()
            if not abs(score) < float("inf"):
                raise SlimtuneError(f"the {self.trials.metric} of {part} with {d:,} numbers is {score}.",
                                    "Lower --learning-rate.")
            self.scores[name] = score
            self.ran += 1
            write_json(self.path, {**self.search_by, "trainings": self.scores})
            shutil.rmtree(self.trials.folder / name, ignore_errors=True)
            self.report({"event": "training", "part": part, "d": d, "score": score,
                         "seconds": time.monotonic() - started})
        return self.scores[name]


def _row(m: Measured) -> dict[str, Any]:
    return {"part": m.part.name, "numbers": m.part.numbers, "full": m.full, "target": m.target,
            "dimension": m.dimension, "scores": {str(d): s for d, s in sorted(m.scores.items())}}
