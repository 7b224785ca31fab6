"""SparseAdapter's question on real questions of bank customers: what does an adapter lose when weights of it are pruned
before it is trained, by which criterion, and is a large sparse one better than a small dense one of as many weights?

    python -m slimtune.bench.sparse_adapter                 # every cell that is not done, and the page
    python -m slimtune.bench.sparse_adapter --minutes 30    # as many as fit, seed by seed; run it again to go on
    python -m slimtune.bench.sparse_adapter --page          # the page alone

The questions are those of recipes/banking77.yaml: --text FOLDER, else SLIMTUNE_TEXT.
"""
import argparse
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.bench.results import record, recorded
from slimtune.bench.sparse_adapter_page import NONE, page
from slimtune.core import attach
from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.examples import Prepared
from slimtune.io.models import load_model, load_tokenizer
from slimtune.methods import get
from slimtune.recipe.folder import write_text
from slimtune.sparsity.prune import prune
from slimtune.train import TrainSpec, fit, predict

OUT, DOC = Path("benchmarks/results/sparse_adapter.json"), Path("docs/sparse-adapter.md")
TEXT = os.environ.get("SLIMTUNE_TEXT", "../shared/data/text")
MODEL, BOTTLENECK, SEEDS, SCORED = "minilm", 32, (0, 1, 2), 320
DATA: dict[str, Any] = {"label": "category", "max_length": 24, "shots": 10, "test_size": 1000,
                        "validation_fraction": 0.0}
BUDGET = TrainSpec(epochs=6, batch_size=32, learning_rate=3e-3, weight_decay=0.01, warmup=0.1, precision="bfloat16",
                   head_learning_rate=1e-2, save_every=10**6, threads=1)


@dataclass(frozen=True)
class Arm:
    """One adapter: how wide, by which criterion and allocation it is pruned, and how much of it; 0 times for none."""

    criterion: str = "dense"
    sparsity: float = 0.0
    times: int = 1
    allocation: str = "global"

    @property
    def title(self) -> str:
        if not self.times:
            return NONE
        name = "ER" if self.allocation == "er" else self.criterion
        return f"{self.times}x {name}" + (f" {self.sparsity:.0%}" if self.sparsity else "")


ARMS = [Arm(times=0), Arm(), *(Arm("snip", s) for s in (0.2, 0.4, 0.6, 0.8, 0.9)),
        *(Arm(c, 0.4) for c in ("magnitude", "random", "grasp")), Arm("random", 0.4, allocation="er"),
        *(Arm("snip", s, times) for times, s in ((2, 1 / 2), (3, 2 / 3), (4, 3 / 4)))]


@dataclass(frozen=True)
class Ground:
    """Model and data, loaded once: a delta that is detached leaves the model bitwise as it was."""

    model: nn.Module
    data: Prepared

    @classmethod
    def load(cls, text: str) -> "Ground":
        home = Path(text) / "banking77"
        spec = DataSpec(task="classification", train=str(home / "train.csv"), test=str(home / "test.csv"), **DATA)
        data = prepare(spec, load_tokenizer(MODEL))
        return cls(load_model(MODEL, spec.task, label_names=data.label_names), data)


def learn(arm: Arm, ground: Ground, seed: int) -> dict[str, Any]:
    """Prune at the start, train in the budget, and score on test."""
    start, data = time.monotonic(), ground.data
    assert data.train is not None
    method = get("houlsby")(bottleneck=BOTTLENECK * arm.times, pooler=True) if arm.times else (
        get("linear_probe")(pooler=True))
    delta = attach(ground.model, method, "sparse", seed=seed)
    try:
        sizes = {"adapter": delta.count().adapter, "matrices": None, "kept": None}
        if arm.sparsity:
            rows = [data.train[i * len(data.train) // SCORED] for i in range(SCORED)]  # of all classes
            batches = [data.collate(rows[i::10]) for i in range(10)]
            done = prune(delta, arm.sparsity, arm.criterion, allocation=arm.allocation, batches=batches, seed=seed)
            sizes |= {"matrices": done.total, "kept": done.kept}
        with tempfile.TemporaryDirectory() as folder:
            trained = fit(delta, data.train, None, data.collate, None, BUDGET.model_copy(update={"seed": seed}), folder)
        state = delta.state()
        assert not any(state[n][~mask].any() for n, mask in delta.masks.items()), "a pruned weight came back"
        found = predict(ground.model, data.test, data.collate, by_length=True, precision=BUDGET.precision)
        trainable = delta.count().adapter
    finally:
        delta.detach()
    losses = [line["loss"] for line in trained.history if "loss" in line]
    return {**metrics("classification")(found.predictions, found.references), **sizes, "trainable": trainable,
            "train_loss": losses[-1], "first_loss": losses[0], "seconds": round(time.monotonic() - start, 1)}


def budget() -> dict[str, Any]:
    """What every cell gets."""
    train = BUDGET.model_dump(mode="json", exclude={"seed"})
    return {"model": MODEL, "bottleneck": BOTTLENECK, "data": DATA, "scored": SCORED, "train": train}


def main() -> None:
    """Run, keep each cell as it comes, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--text", default=TEXT, help="folder of the text sets")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    found, until = recorded(options.out, "budget", budget(), cells={}), time.monotonic() + 60 * options.minutes
    todo = [] if options.page else [(s, arm) for s in options.seeds for arm in ARMS
                                    if f"{arm.title}/{s}" not in found["cells"]]
    ground = Ground.load(options.text) if todo else None
    for seed, arm in todo:
        if time.monotonic() > until or ground is None:
            print("the time is up; run it again to go on", flush=True)
            break
        cell = found["cells"][f"{arm.title}/{seed}"] = {**asdict(arm), "seed": seed, **learn(arm, ground, seed)}
        print(arm.title, seed, {k: cell[k] for k in ("accuracy", "train_loss", "kept", "seconds")}, flush=True)
        record(options.out, found)
    if found["cells"]:
        write_text(options.doc, page(found))


if __name__ == "__main__":
    main()
