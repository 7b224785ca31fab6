"""`slimtune predict`: one JSON line an input, a text or an image."""
import json
import sys
from typing import Annotated, Any

import typer

from slimtune.cli.console import set_logging, verb
from slimtune.errors import DataError


@verb
def predict(run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
            source: Annotated[str, typer.Argument(metavar="FILE|-", help="A file with the recipe's columns (.txt: one "
                                                  "text or image path a line), an image, a folder or .zip of images, "
                                                  "or - for lines of text or JSON objects.")] = "",
            text: Annotated[list[str] | None, typer.Option(help="A text, in place of a file; may be repeated.")] = None,
            pair: Annotated[list[str] | None, typer.Option(help="The second text of each pair.")] = None,
            image: Annotated[list[str] | None, typer.Option(help="An image file, in place of FILE; may be "
                                                            "repeated.")] = None) -> None:
    """Predict with a run: prints one JSON object a line, in the order of the input."""
    from slimtune.data.spec import IMAGES
    from slimtune.recipe.folder import open_run
    from slimtune.recipe.use import parse_lines, predict_run

    if bool(source) + bool(text) + bool(image) != 1:
        raise DataError("predict needs texts: a FILE, - for standard input, or --text; or images: FILE or --image.",
                        "Give one of them.")
    if pair and len(pair) != len(text or ()):
        raise DataError(f"{len(pair)} --pair for {len(text or ())} --text.", "Give one --pair for each --text.")
    given: Any = source
    if source == "-":
        given = parse_lines(sys.stdin)
    elif text or image:
        spec = open_run(run)[1].data
        if bool(image) != (spec.task in IMAGES):
            raise DataError(f"--{'image' if image else 'text'}: {run} is a run of {spec.task}.",
                            f"Give --{'text' if image else 'image'}, or a file.")
        given = [{spec.image if image else spec.text: one} for one in text or image or ()]
        for row, other in zip(given, pair or (), strict=False):
            row[spec.pair or "pair"] = other
    set_logging()
    for line in predict_run(run, given):
        print(json.dumps(line, ensure_ascii=False))
