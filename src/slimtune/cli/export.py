"""`slimtune export`: a run or a model as a folder that onnxruntime or OpenVINO runs."""
from typing import Annotated, Literal

import typer

from slimtune.cli.console import set_logging, size, verb


@verb
def export(source: Annotated[str, typer.Argument(metavar="SOURCE", help="The folder of a finished run, or of a model "
                                                                        "with a head, shrunk or not.")],
           to: Annotated[Literal["onnx", "openvino"], typer.Option(help="What is to run it.")] = "onnx",
           int8: Annotated[bool, typer.Option("--int8", help="Matrices of 8 bits (7 where this CPU has no VNNI); "
                                                            "onnx only.")] = False,
           output: Annotated[str, typer.Option(help="Folder to write; by default SOURCE-onnx, SOURCE-onnx-int8 or "
                                                    "SOURCE-openvino.")] = "") -> None:
    """Write the model of a run for onnxruntime or OpenVINO, and prove that it gives the same outputs.

    A delta is merged into its backbone; one that is no change of weights goes into the graph as it runs.
    """
    from slimtune.recipe.export import export as run

    set_logging()
    done = run(source, output or None, to, int8)
    print(f"{done.folder}: {to}{' int8' if int8 else ''}, {size(done.size)} (float32 weights {size(done.dense)}); "
          f"differs from the model by at most {done.proof.difference:.1e} on {len(done.proof.shapes)} shapes")
