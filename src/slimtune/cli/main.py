"""`slimtune VERB [RECIPE.yaml] [a.b=c ...]`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 interrupted and resumable.
"""
import os
from typing import Annotated

import typer

from slimtune.cli.check import check
from slimtune.cli.convert import convert
from slimtune.cli.eval import evaluate
from slimtune.cli.export import export
from slimtune.cli.inspect import inspect
from slimtune.cli.methods import methods
from slimtune.cli.predict import predict
from slimtune.cli.prune import prune
from slimtune.cli.search import app as search
from slimtune.cli.tune import tune

app = typer.Typer(name="slimtune", add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
                  epilog="Exit codes: 0 done, 1 the run failed, 2 bad input, 3 interrupted and resumable.")
for _name, _verb in (("tune", tune), ("eval", evaluate), ("predict", predict), ("methods", methods),
                     ("inspect", inspect), ("check", check), ("convert", convert),
                     ("prune", prune), ("export", export)):
    app.command(_name)(_verb)
app.add_typer(search, name="search")


def _version(wanted: bool) -> None:
    if wanted:
        from slimtune.recipe.env import version

        typer.echo(f"slimtune {version('slimtune')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False) -> None:
    """Adapt one pretrained Transformer to many tasks by training a small delta."""


def main() -> None:
    """The entry point of the command `slimtune`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters is said by slimtune, in a line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="slimtune")
