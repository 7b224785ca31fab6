"""A toy task that a tiny BERT learns in a moment, and helpers to compare runs."""
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import slimtune as st
from slimtune.core.delta import Delta
from slimtune.core.method import Method
from slimtune.testing import tiny
from slimtune.testing.kill import file_operations, run_killed
from slimtune.train import TrainResult, TrainSpec, fit
from slimtune.train.checkpoint import checkpoints

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
EVERY = TrainSpec(**{**SPEC.model_dump(), "save_every": 1, "keep": 99, "weight_decay": 0.1})
"""With decay, and every step saved."""


def run(folder: Path, delta: Delta | None = None, spec: TrainSpec = SPEC, **options: Any) -> tuple[Delta, TrainResult]:
    delta = delta or attached()
    return delta, fit(delta, rows(), rows(9, seed=1), collate, accuracy, spec, folder, **options)


def sha(delta: Delta) -> str:
    """SHA-256 over the names and bits of all tensors of a delta."""
    digest = hashlib.sha256()
    for name, tensor in sorted(delta.state().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def copy_run(source: Path, target: Path, step: int) -> None:
    """The folder as it was when the run was killed just after that step's save, and before later lines."""
    shutil.copytree(source, target)
    for path in checkpoints(target):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)


def check_resumes(home: Path, make: Callable[[], Delta], spec: TrainSpec, steps: Sequence[int],
                  **options: Any) -> Delta:
    """From its checkpoints after these steps a run goes on to the same weights, masks, history and information."""
    delta, result = run(home / "whole", make(), spec, **options)
    for step in steps:
        copy_run(home / "whole", home / f"{step}", step)
        torch.manual_seed(step)
        again, other = run(home / f"{step}", make(), spec, **options)
        assert sha(again) == sha(delta)
        assert same_masks(again, delta)
        assert other.history == result.history
        assert again.info == delta.info
    return delta


def same_masks(one: Delta, two: Delta) -> bool:
    return one.masks.keys() == two.masks.keys() and all(torch.equal(one.masks[n], m) for n, m in two.masks.items())


def check_killed(folder: Path, go: Callable[[], tuple[Delta, TrainResult]]) -> None:
    """Killed at operations all over a run, it goes on to the very weights and masks."""
    delta, _ = go()
    shutil.rmtree(folder)
    count = len(file_operations(go))
    shutil.rmtree(folder)
    for n in range(count // 4, count, count // 4):
        assert run_killed(go, n)
        again, _ = go()
        assert sha(again) == sha(delta)
        assert same_masks(again, delta)
        shutil.rmtree(folder)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
