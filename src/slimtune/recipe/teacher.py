"""teacher: the model that a recipe's `distill` names, ready to teach."""
from collections.abc import Sequence
from pathlib import Path

from slimtune.errors import RecipeError, listing
from slimtune.io.models import load_model
from slimtune.objectives.distillation import Teacher
from slimtune.recipe.folder import RECIPE
from slimtune.recipe.tree import Recipe
from slimtune.recipe.use import load_run


def teacher(recipe: Recipe, labels: Sequence[str]) -> Teacher | None:
    """None without one. Errors: RecipeError for a teacher of other labels, or one whose head was never trained."""
    spec = recipe.distill
    if spec is None:
        return None
    if (Path(spec.teacher) / RECIPE).is_file():
        tuned = load_run(spec.teacher)
        model, known = tuned.model, tuned.labels
    else:
        model = load_model(spec.teacher, recipe.data.task)
        names = getattr(model.config, "id2label", None) or {}
        known = tuple(names[i] for i in sorted(names))
    if labels and tuple(known) != tuple(labels):
        raise RecipeError(f"distill.teacher: {spec.teacher} has the labels {listing(known, 8)}; the data has "
                          f"{listing(labels, 8)}.", "Name a finished run on the same labels, or a model that has them.")
    return Teacher(model, spec)
