"""`slimtune convert`: a delta from PEFT's or AdapterHub's format to ours, or back."""
from pathlib import Path
from typing import Annotated, Literal

import typer

from slimtune.cli.console import set_logging, size, verb


@verb
def convert(src: Annotated[str, typer.Argument(
                metavar="SRC", help="Folder of an adapter of PEFT or AdapterHub, a delta or a run.")],
            dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; it must not hold other files.")],
            to: Annotated[Literal["peft", "adapterhub", "slimtune"] | None, typer.Option(
                help="Format to write; by default slimtune's, and PEFT's for a delta or a run.")] = None,
            model: Annotated[str, typer.Option(help="The model it was trained on; by default the one it names.")] = "",
            ) -> None:
    """Convert a delta between the formats of slimtune, PEFT and AdapterHub, and prove that it loads.

    An AdapterHub folder holds no pickle: in that library, model.load_adapter(DST, use_safetensors=True) loads it.
    """
    from slimtune.recipe.convert import convert as run

    set_logging()
    done = run(Path(src), Path(dst), to, model or None)
    print(f"{dst}: {done.format}, {done.tensors} tensors, {size(done.size)}")
