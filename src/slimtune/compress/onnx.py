"""onnx: an encoder with a head as an ONNX graph, and the graph in onnxruntime.

Measured on MiniLM (6 layers of 384; 64 tokens, batch 1 and 8, one thread of an EPYC Zen 4, onnxruntime 1.32): the
kernel of onnxruntime's own fusion of a sum with the layer norm behind it is slow on CPUs, and costs 10 to 20 % in
float32 and a third in int8, so `open_onnx` switches it off. onnxruntime.transformers' optimiser finds the same fusion,
no attention, and gains nothing; it is not used.
"""
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.compress.extra import need, quiet
from slimtune.compress.traced import Proof, Run, Traced, plain_attention, prove, resized, shapes_to_try
from slimtune.core.modes import evaluating
from slimtune.errors import SlimtuneError

OPSET = 20
"""The first with GELU as one operator."""
SLOW_FUSIONS = ("SkipLayerNormFusion",)


def export_onnx(model: nn.Module, path: Path | str, batch: Mapping[str, Any]) -> Proof:
    """Write a model's forward as one ONNX file, for any batch size and number of tokens, and prove that it is the same.

    batch: an example of what it will read. Its file appears only when onnxruntime has given the model's logits on
    several shapes, to 1e-4.
    Errors: ExtraError without the extra `export`; SlimtuneError for a model that cannot be traced or has no logits;
    TrainError for a graph that differs.

    Example:
        >>> import tempfile
        >>> from slimtune.testing import batch, tiny
        >>> with tempfile.TemporaryDirectory() as home:
        ...     proof = export_onnx(tiny("vit"), home + "/vit.onnx", batch("vit"))
        >>> proof.shapes, proof.difference < 1e-4
        (((3,), (1,), (6,)), True)
    """
    need("onnxruntime")
    subject, path = Traced(model, batch), Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with evaluating(model), plain_attention(model), quiet():
            _trace(subject).save(str(beside))
        proof = prove(subject, open_onnx(beside))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return proof


def _trace(subject: Traced) -> Any:
    for package in ("onnx", "onnxscript"):
        need(package)
    example = resized(subject.inputs, *shapes_to_try(subject)[0])
    rows, tokens = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes = tuple({0: rows, 1: tokens} if value.dim() == 2 else {0: rows} for value in example.values())
    try:
        return torch.onnx.export(subject, tuple(example.values()), dynamo=True, verbose=False,
                                 dynamic_shapes=(axes,), input_names=list(example), output_names=["logits"],
                                 opset_version=OPSET)
    except Exception as error:  # torch's exporter has no kind of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SlimtuneError(f"a {type(subject.model).__name__} cannot be exported to ONNX: {first[:300]}",
                            "Encoders that classify can be: BERT, RoBERTa, ELECTRA, ViT, Swin ...") from error


def open_onnx(path: Path | str, threads: int | None = None) -> Run:
    """An ONNX file in onnxruntime on the CPU: from a batch to logits. threads: by default as many as torch's.

    Errors: ExtraError, and SlimtuneError for a file that is no such graph.
    """
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or torch.get_num_threads(), 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"],
                                           disabled_optimizers=list(SLOW_FUSIONS))
    except Exception as error:  # onnxruntime has a kind for each of its codes
        raise SlimtuneError(f"{path}: onnxruntime cannot open it: {str(error).strip()[:300]}") from error
    names = [node.name for node in session.get_inputs()]

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {name: batch[name].numpy() for name in names})[0])

    return run
