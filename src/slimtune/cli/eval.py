"""`slimtune eval`: score a finished run."""
from typing import Annotated

import typer

from slimtune.cli.console import set_logging, table, verb


@verb
def evaluate(run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
             overrides: Annotated[list[str] | None, typer.Argument(
                 metavar="data.b=c", help="Other data, such as data.test=new.csv.")] = None) -> None:
    """Score a run on its test split, or on other data."""
    from slimtune.recipe import evaluate_run
    from slimtune.recipe.card import unit

    set_logging()
    split, examples, scores = evaluate_run(run, overrides or ())
    table(["metric", "value", "unit"], [[name, f"{value:.4f}", unit(name)] for name, value in scores.items()],
          f"{run} on {split} ({examples:,} examples)")
