"""`slimtune inspect`: the anatomy of a model, or what a delta's folder holds."""
from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.console import table, verb


@verb
def inspect(model: Annotated[str, typer.Argument(metavar="MODEL", help="A model (folder, packaged name, ORG/NAME), or "
                                                                      "the folder of a run or of a delta.")]) -> None:
    """Show the towers, blocks and sites of a model, or the summary of a run's delta."""
    from slimtune.recipe.catalogue import anatomy_of, delta_summary, is_delta

    if is_delta(Path(model)):
        table(["", ""], [[key, value] for key, value in delta_summary(Path(model))])
    else:
        print(anatomy_of(model))
