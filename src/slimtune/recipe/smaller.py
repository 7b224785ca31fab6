"""shrink_run: of a finished run whose gates or masks emptied heads and neurons, the model without them."""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtune.core import attach
from slimtune.core.merge import merged
from slimtune.errors import MethodError, RecipeError
from slimtune.io.model_folder import save_model
from slimtune.io.models import load_model
from slimtune.recipe.folder import open_run, write_json
from slimtune.recipe.tree import Recipe
from slimtune.recipe.use import load_run
from slimtune.sparsity.shrink import Shrunk, shrink
from slimtune.sparsity.target import SLICED

MODEL, SHRUNK = "model", "shrunk.json"


@dataclass(frozen=True)
class Smaller:
    """The folder of the small model, a model like any other, and what was left out of it."""

    folder: Path
    shrunk: Shrunk
    size: int
    """Bytes of its weights."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.shrunk), "model": self.folder.name, "bytes": self.size}


def shrink_run(folder: Path | str) -> Smaller:
    """Fold the run's delta into its backbone, slice out what is 0, and write `model/` beside the delta.

    Errors: RecipeError for no run; MethodError for a delta that cannot be folded; the run is left as it was.
    """
    path, _ = open_run(folder)
    tuned = load_run(path)
    done = shrink(tuned.model)
    save_model(tuned.model, path / MODEL, tuned.tokenizer)
    found = Smaller(path / MODEL, done, sum(p.stat().st_size for p in (path / MODEL).glob("*.safetensors")))
    write_json(path / SHRUNK, found.as_dict())
    return found


def need_prune(recipe: Recipe, name: str) -> None:
    """Errors: RecipeError for a recipe that prunes nothing; MethodError for gates that no model is sliced by."""
    if recipe.prune is None:
        raise RecipeError(f"{name}: has no prune, so there is nothing to prune.",
                          "Say how much: prune.sparsity=0.5, with prune.on=gates to make the model smaller.")
    if recipe.prune.on in SLICED:
        model = load_model(recipe.model, recipe.data.task, label_names=recipe.data.labels or (), meta=True)
        try:
            merged(attach(model, recipe.method, recipe.delta_name), zeros="fill")
        except MethodError as error:
            raise MethodError(f"{name}: its delta cannot be folded in, so nothing could be sliced: {error.what}",
                              "Train full or lora beside the gates, or keep the delta: slimtune tune.") from None
