"""openvino: the same graph as OpenVINO's intermediate representation: an .xml file and its weights in a .bin."""
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.compress.extra import need
from slimtune.compress.onnx import export_onnx
from slimtune.compress.traced import Proof, Run, Traced, prove
from slimtune.errors import SlimtuneError


def export_openvino(model: nn.Module, path: Path | str, batch: Mapping[str, Any], *,
                    onnx: Path | str | None = None) -> Proof:
    """Write a model's forward as `path` (.xml) and the .bin of the same name, by way of ONNX, and prove it.

    Weights stay in float32. onnx: what `export_onnx` wrote of the model, where that is there already.
    Errors: as `export_onnx`; SlimtuneError for a path that does not end in .xml.
    """
    openvino, path = need("openvino"), Path(path)
    if path.suffix != ".xml":
        raise SlimtuneError(f"{path}: OpenVINO's graph is an .xml file.", f"Name it {path.stem}.xml")
    with TemporaryDirectory(dir=path.parent) as home:
        graph, source = Path(home, path.name), Path(onnx or Path(home, "model.onnx"))
        if onnx is None:
            export_onnx(model, source, batch)
        net = openvino.Core().read_model(str(source))  # convert_model would send statistics of its use
        openvino.save_model(net, str(graph), compress_to_fp16=False)
        proof = prove(Traced(model, batch), open_openvino(graph))
        for suffix in (".bin", ".xml"):
            os.replace(graph.with_suffix(suffix), path.with_suffix(suffix))  # noqa: PTH105
    return proof


def open_openvino(path: Path | str, threads: int | None = None) -> Run:
    """An .xml file in OpenVINO on the CPU: from a batch to logits. threads: by default as many as torch's.

    It computes in float32, also where the CPU has bfloat16, which OpenVINO would choose by itself.
    Errors: ExtraError, and SlimtuneError for a file that is no such graph.
    """
    openvino = need("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:  # RuntimeError, and kinds of its own
        raise SlimtuneError(f"{path}: OpenVINO cannot open it: {str(error).strip()[:300]}") from error
    names = [node.get_any_name() for node in compiled.inputs]

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: batch[name].numpy() for name in names})[0].copy())

    return run
