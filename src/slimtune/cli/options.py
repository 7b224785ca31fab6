"""Arguments and options that verbs share."""
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Values that replace the recipe's.")]
Resume = Annotated[bool, typer.Option(help="Go on with a run that was stopped; --no-resume refuses a folder that has "
                                           "one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
