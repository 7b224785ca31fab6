"""The deployed side of the pruning benchmark: each model as an ONNX graph in float32 and int8, scored and timed."""
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.compress.int8 import quantise_onnx
from slimtune.compress.latency import latency
from slimtune.compress.onnx import export_onnx, open_onnx
from slimtune.data import metrics
from slimtune.data.examples import Prepared
from slimtune.io.models import load_model

BATCHES, ROUNDS = (1, 8, 32), 40
FLOAT, INT8 = "model.onnx", "int8.onnx"


def quantised(folders: Mapping[str, Path], batch: Mapping[str, Any],
              data: Prepared) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Write both graphs of each model, and score the int8 one: (name, row, logits)."""
    for name, folder in folders.items():
        graphs = beside(folder)
        graphs.mkdir(parents=True, exist_ok=True)
        proof = export_onnx(load_model(folder), graphs / FLOAT, batch)
        quantise_onnx(graphs / FLOAT, graphs / INT8)
        logits = _logits(graphs / INT8, data)
        references = [row["labels"] for row in data.test or ()]
        row = dict(metrics("classification")(logits.numpy(), references))
        yield name, {**row, "bytes": {f: (graphs / f).stat().st_size for f in (FLOAT, INT8)},
                     "difference_of_float32_graph": proof.difference}, logits


def beside(folder: Path) -> Path:
    """Where the graphs of a model are: its own folder holds nothing that it does not name."""
    return folder.parent / "graphs" / folder.name


def _logits(path: Path, data: Prepared) -> Tensor:
    """Question by question: int8 rounds what it reads by the range of the whole batch."""
    run, test = open_onnx(path), data.test
    assert test is not None
    return torch.cat([run(data.collate([test[i]])) for i in range(len(test))])


def measure(folders: Mapping[str, Path], batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The latency of each model in torch and in onnxruntime, float32 and int8, in one paired run a batch size."""
    threads, before = 1, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {str(size): latency(contenders(folders, _of_size(batch, size, tokens), threads), ROUNDS, batch=size,
                                   sequence=tokens, onnx_threads=threads).as_dict() for size in BATCHES}
    finally:
        torch.set_num_threads(before)


def contenders(folders: Mapping[str, Path], batch: dict[str, Tensor], threads: int) -> dict[str, Callable[[], Any]]:
    """What is timed; the dense model in torch comes first."""
    made: dict[str, Callable[[], Any]] = {}
    for name, folder in folders.items():
        made[f"{name} torch"] = _torch(load_model(folder), batch)
        for kind, file in (("float32", FLOAT), ("int8", INT8)):
            if (graph := beside(folder) / file).is_file():
                made[f"{name} onnxruntime {kind}"] = _onnx(open_onnx(graph, threads), batch)
    return made


def _torch(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(**batch).logits
    return run


def _onnx(session: Callable[..., Tensor], batch: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: session(batch)


def _of_size(batch: Mapping[str, Any], size: int, tokens: int) -> dict[str, Tensor]:
    """So many examples of exactly so many tokens: real ones, again and again until the length is reached."""
    ids = batch["input_ids"][:size]
    ids = torch.cat([ids] * (tokens // ids.shape[1] + 1), 1)[:, :tokens]
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in batch else {})
