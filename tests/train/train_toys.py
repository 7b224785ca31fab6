"""A toy task that a tiny BERT learns in a moment, and helpers to compare runs."""
import hashlib
from pathlib import Path
from typing import Any

import torch

import slimtune as st
from slimtune.core.delta import Delta
from slimtune.core.method import Method
from slimtune.testing import tiny
from slimtune.train import TrainResult, TrainSpec, fit

ROWS = 22


def rows(count: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 4 to 8 tokens; the label is told by the first."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 9, (), generator=draw))
        ids = torch.randint(3, 99, (length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": ids[0] % 3})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    pads = [longest - len(row["input_ids"]) for row in batch]
    made = {"input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(batch, pads, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in pads])}
    if "labels" in batch[0]:
        made["labels"] = torch.tensor([row["labels"] for row in batch])
    return made


def accuracy(predictions: torch.Tensor, references: torch.Tensor) -> dict[str, float]:
    return {"accuracy": float((predictions.argmax(-1) == references).float().mean())}


def attached(method: Method | None = None, **changes: Any) -> Delta:
    """A tiny BERT with dropout 0.1 in the backbone, and LoRA with dropout 0.1 on it."""
    method = method or st.methods.LoRA(rank=2, dropout=0.1)
    return st.attach(tiny("bert", dropout=True, **changes), method)


SPEC = TrainSpec(epochs=3, batch_size=4, gradient_accumulation=2, learning_rate=1e-2, log_every=2, threads=1)
"""22 rows: 6 batches and 3 steps an epoch, the last batch of 2 rows."""


def run(folder: Path, delta: Delta | None = None, spec: TrainSpec = SPEC, **options: Any) -> tuple[Delta, TrainResult]:
    delta = delta or attached()
    return delta, fit(delta, rows(), rows(9, seed=1), collate, accuracy, spec, folder, **options)


def sha(delta: Delta) -> str:
    """SHA-256 over the names and bits of all tensors of a delta."""
    digest = hashlib.sha256()
    for name, tensor in sorted(delta.state().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
