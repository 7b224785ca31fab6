"""`slimtune check`: validate a recipe, and say what it would train, without training."""
import json
from typing import Annotated

import typer

from slimtune.cli.console import set_logging, size, table, verb
from slimtune.cli.options import Overrides
from slimtune.errors import RecipeError


@verb
def check(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a .yaml file.")] = "",
          overrides: Overrides = None,
          schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False) -> None:
    """Validate a recipe and its data; print counts, memory and steps. Trains nothing."""
    if schema:
        from slimtune.recipe.schema import schema as tree

        print(json.dumps(tree(), indent=2))
        return
    if not recipe:
        raise RecipeError("check needs a recipe.", "For example: slimtune check recipes/own-csv.yaml")
    from slimtune.recipe.parse import read_recipe
    from slimtune.recipe.plan import plan

    found = plan(read_recipe(recipe, overrides or ()))
    set_logging()
    table(["", ""], [["adapter", f"{found.count.adapter:,}"], ["norms", f"{found.count.norms:,}"],
                     ["head", f"{found.count.head:,}"], ["stored", f"{found.count.stored:,}"],
                     ["backbone", f"{found.count.backbone:,}"]], "numbers trained and stored")
    print()
    table(["", ""], [[key, size(value)] for key, value in found.memory.items()],
          "memory, without activations (estimated)")
    print()
    table(["", ""], [[key, value] for key, value in found.steps.items()], "data and steps")
    for note in found.notes:
        print(f"note: {note}")
    print("\nThe recipe is valid; nothing was trained.")
