"""`slimtune search`: what to adapt, found by training."""
from typing import Annotated, Any, Literal

import typer

from slimtune.cli.console import set_logging, table, verb
from slimtune.cli.options import Overrides
from slimtune.errors import RecipeError

app = typer.Typer(name="search", no_args_is_help=True, rich_markup_mode=None,
                  help="Search what to adapt: intrinsic, the local intrinsic dimension of submodules.")


@app.callback()
def root() -> None:
    """Search what to adapt."""


@app.command("intrinsic")
@verb
def intrinsic(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a .yaml file; its method is not "
                                                                           "used.")],
              overrides: Overrides = None,
              sites: Annotated[str, typer.Option(help="Submodules, with commas between them; by default "
                                                      "attn.q,attn.v,mlp.up,mlp.down.")] = "",
              per_block: Annotated[bool, typer.Option("--per-block", help="Measure each block's apart.")] = False,
              share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of full tuning's score.")] = 0.9,
              of: Annotated[Literal["score", "gain"], typer.Option(
                  help="Share of the score, or of what full tuning gains over the head alone.")] = "score",
              against: Annotated[Literal["part", "run"], typer.Option(
                  help="Full tuning of the submodule, or of all of them together.")] = "part",
              steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 100,
              learning_rate: Annotated[float, typer.Option(min=1e-12, help="Of a weight; the head has the recipe's.")
                                       ] = 1e-4,
              start: Annotated[int, typer.Option(min=1, help="The first number of trained numbers.")] = 16,
              most: Annotated[int, typer.Option(min=1, help="The largest.")] = 4096,
              bisections: Annotated[int, typer.Option(min=0, max=40, help="Behind the doubling.")] = 2) -> None:
    """Measure how few numbers each submodule needs, and propose where KAdaptation should go.

    Trains each submodule in random subspaces of growing dimension, the rest frozen, until the validation score is
    90% of that of full tuning of the submodule. A search that was stopped goes on; its folder is runs/NAME-intrinsic.
    """
    from slimtune.recipe import read_recipe
    from slimtune.recipe.intrinsic import search_intrinsic
    from slimtune.search.intrinsic import Search

    if start > most:
        raise RecipeError(f"--start {start} is above --most {most}.", "Lower --start.")
    tree = read_recipe(recipe, overrides or ())
    set_logging()
    found = search_intrinsic(tree, Search(share, of, against, start, most, bisections),
                             [s for s in sites.replace(" ", "").split(",") if s], per_block=per_block, steps=steps,
                             learning_rate=learning_rate, report=_tell)
    metric = found.values["metric"]
    rows = [[m.part.name, f"{m.part.numbers:,}", f"{m.full:.4f}", f"{m.target:.4f}",
             f"> {min(most, m.part.numbers):,}" if m.dimension is None else f"{m.dimension:,}"] for m in found.table]
    print()
    table(["submodule", "numbers", f"{metric} in full", "target", "dimension"], rows,
          f"local intrinsic dimension: {share:.0%} of the {of}; the head alone has {found.values['head']:.4f}; "
          f"scores on {found.values['validation']:,} validation examples")
    print(f"\n{_advice(found.proposal, [m.dimension for m in found.table], recipe, of)}\nfolder: {found.folder}")


def _advice(proposal: str, dimensions: list[int | None], recipe: str, of: str) -> str:
    if proposal:
        return f"Adapt the lowest: slimtune tune {recipe} '{proposal}'"
    if 0 in dimensions and of == "score":
        return "The head alone reaches the target: a share of the gain over it says more, --of gain."
    if 0 in dimensions:
        return "Full tuning gains nothing over the head alone: raise --steps or --learning-rate."
    return "No submodule reached its target: raise --most or --steps."


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == "plan":
        number = len(event["parts"])
        print(f"{event['most']} trainings at most, of {event['steps']:,} steps each, for {number} "
              f"submodule{'s' * (number > 1)}; {event['known']} are known", flush=True)
        return
    what = "the head alone" if event["part"] == "head" else f"{event['part']}, {event['d']:,} numbers"
    print(f"{what}: {event['score']:.4f}  {event['seconds']:.0f} s", flush=True)
