"""`slimtune methods`: every method, and what it counts on a model."""
from typing import Annotated

import typer

from slimtune.cli.console import table, verb


@verb
def methods(model: Annotated[str, typer.Option(help="Count each method on this model: a folder, a packaged name, "
                                                    "or ORG/NAME.")] = "") -> None:
    """List the methods: source, year, primitive, what each trains; with --model, its counts."""
    from slimtune.recipe.catalogue import catalogue, counts

    entries = catalogue()
    if not model:
        table(["method", "year", "primitive", "trains", "paper"],
              [[e.name, e.year, e.primitive, e.trains, e.paper] for e in entries])
        return
    what, found = counts(model)
    rows = []
    for entry in entries:
        count = found[entry.name]
        if isinstance(count, str):
            rows.append([entry.name, "", "", "", "", "", count])
        else:
            rows.append([entry.name, f"{count.adapter:,}", f"{count.norms:,}", f"{count.head:,}", f"{count.stored:,}",
                         f"{count.percent:.3f}", ""])
    table(["method", "adapter", "norms", "head", "stored", "% of backbone", "note"], rows,
          f"{what}: numbers trained and stored by each method with its defaults")
