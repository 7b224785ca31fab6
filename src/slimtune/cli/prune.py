"""`slimtune prune`: train what a recipe describes while it is pruned, and write the smaller model."""
import logging
from typing import Annotated, Any

import typer

from slimtune.cli.console import set_logging, size, table, verb
from slimtune.cli.options import Overrides, Quiet, Resume
from slimtune.cli.progress import progress


@verb
def prune(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe with `prune`, a .yaml file.")],
          overrides: Overrides = None,
          resume: Resume = True,
          quiet: Quiet = False) -> None:
    """Prune and train; with prune.on=gates or hidden, slice them out and write RUN/model, a model like any other."""
    from slimtune.recipe import read_recipe, run
    from slimtune.recipe.export import TASKS
    from slimtune.recipe.smaller import need_prune, shrink_run
    from slimtune.sparsity.target import SLICED

    tree = read_recipe(recipe, overrides or ())
    need_prune(tree, recipe)
    set_logging(logging.ERROR if quiet else logging.WARNING)
    with progress(quiet) as report:
        result = run(tree, resume="auto" if resume else False, report=report)
    smaller = shrink_run(result.folder) if tree.prune is not None and tree.prune.on in SLICED else None
    if quiet:
        return
    if result.again:
        print(f"{result.folder}: this run is finished already; it was not trained again.")
    _show(result.values)
    if smaller is None:
        print("\nThese are zeros, not a smaller model: no dense kernel is faster for them. Prune gates for that "
              "(prune.on=gates or hidden).")
    else:
        print(f"\n{smaller.shrunk}\nmodel folder: {smaller.folder} ({size(smaller.size)})"
              + (f"; next: slimtune export {smaller.folder} --int8" if tree.data.task in TASKS else ""))
    print(f"run folder: {result.folder}")


def _show(values: dict[str, Any]) -> None:
    found = values["sparsity"] or {}
    rows = [[f"{split} {name}", "undefined" if value is None else f"{value:.4f}"]
            for split, scores in values["metrics"].items() for name, value in scores.items()]
    rows += [["pruned", f"{found['sparsity']:.2%} of {found['denominator']}"],
             ["weights that live", f"{found['kept']:,} of {found['total']:,}"],
             ["delta folder", size(values["files"]["delta"])]] if found else []
    print()
    table(["", "value"], rows, f"{values['name']}: {values['steps']:,} steps")
