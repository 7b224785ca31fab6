"""`slimtune tune`: train what a recipe describes, or go on with it."""
import logging
from typing import Annotated, Any

import typer

from slimtune.cli.console import set_logging, size, table, verb
from slimtune.cli.options import Overrides, Quiet, Resume
from slimtune.cli.progress import progress


@verb
def tune(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a .yaml file.")],
         overrides: Overrides = None,
         resume: Resume = True,
         quiet: Quiet = False) -> None:
    """Train a delta and evaluate it; writes a run's folder, runs/NAME by default."""
    from slimtune.recipe import read_recipe, run

    tree = read_recipe(recipe, overrides or ())
    set_logging(logging.ERROR if quiet else logging.WARNING)
    with progress(quiet) as report:
        result = run(tree, resume="auto" if resume else False, report=report)
    if quiet:
        return
    if result.again:
        print(f"{result.folder}: this run is finished already; nothing was done.")
    _show(result.values)
    print(f"\nrun folder: {result.folder}")


def _show(values: dict[str, Any]) -> None:
    counts = values["counts"]
    rows = [[part, f"{counts[part]:,}", ""] for part in ("adapter", "norms", "head", "stored", "backbone")]
    rows.append(["adapter + norms", f"{values['percent']:.3f}", "% of backbone"])
    for split, scores in values["metrics"].items():
        rows += [[f"{split} {name}", "undefined" if value is None else f"{value:.4f}", ""]
                 for name, value in scores.items()]
    amount, unit = size(values["files"]["delta"]).split()
    rows += [["delta folder", amount, unit], ["training", f"{values['seconds']['train']:.1f}", "s"],
             ["peak memory", f"{values['peak_memory']:.0f}", "MiB"]]
    print()
    table(["", "value", "unit"], rows, f"{values['name']}: {values['steps']:,} steps")
    for split, cut in values["cut"].items():
        if cut:
            print(f"note: {cut:,} of {values['examples'][split]:,} texts of {split} were longer than data.max_length "
                  "and lost their end")
