"""A real encoder made smaller for a real task: accuracy against size, multiply-adds and latency.

    python -m slimtune.bench.prune                # everything that is not done, and the page
    python -m slimtune.bench.prune --train        # train, prune and score only; timing wants a quiet machine
    python -m slimtune.bench.prune --time         # time what was trained, in one paired run
    python -m slimtune.bench.prune --page         # the page alone

MiniLM-L6 is fine-tuned on the 77 intents of banking77, then 25, 50 and 75 % of the multiply-adds of its heads and
neurons are pruned, the rest sliced out and trained again with the dense model as its teacher. The questions are those
of recipes/banking77.yaml: --text FOLDER, else SLIMTUNE_TEXT. Models go to --work.
"""
import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bench.prune_page import page
from slimtune.bench.prune_peer import torch_pruning
from slimtune.bench.prune_time import measure, quantised
from slimtune.bench.results import record, recorded
from slimtune.core import attach
from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.examples import Prepared
from slimtune.data.loyalty import label_loyalty, probability_loyalty
from slimtune.errors import SlimtuneError
from slimtune.io.model_folder import save_model
from slimtune.io.models import load_model, load_tokenizer
from slimtune.methods import get
from slimtune.objectives.distillation import Distillation, Teacher
from slimtune.recipe.folder import write_text
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.macs import count_macs
from slimtune.sparsity.prune import prune
from slimtune.sparsity.shrink import shrink
from slimtune.train import TrainSpec, fit, predict

OUT, DOC = Path("benchmarks/results/prune.json"), Path("docs/prune.md")
TEXT = os.environ.get("SLIMTUNE_TEXT", "../shared/data/text")
MODEL, TOKENS, SCORED = "minilm", 32, 512
LEVELS = (0.25, 0.5, 0.75)
DATA: dict[str, Any] = {"label": "category", "max_length": TOKENS, "validation_fraction": 0.0}
DENSE = TrainSpec(epochs=4, batch_size=32, learning_rate=3e-4, weight_decay=0.01, warmup=0.1, precision="bfloat16",
                  head_learning_rate=1e-3, save_every=10**6, threads=1)
AGAIN = DENSE.model_copy(update={"epochs": 2.0, "learning_rate": 2e-4, "head_learning_rate": 5e-4})
TEACH = Distillation(teacher="dense", weight=0.9, temperature=2.0)


@dataclass(frozen=True)
class Arm:
    """One way to a smaller model. how: "fisher" and "magnitude" are ours, "torch-pruning" is the peer's."""

    how: str
    level: float = 0.0

    @property
    def name(self) -> str:
        return self.how if not self.level else f"{self.how}-{self.level:.0%}".replace("%", "")


ARMS = [Arm("dense"), *(Arm("fisher", level) for level in LEVELS), Arm("magnitude", 0.5), Arm("torch-pruning", 0.5)]


class Bench:
    """The data, and a folder of models."""

    def __init__(self, text: str, work: Path) -> None:
        home = Path(text) / "banking77"
        spec = DataSpec(task="classification", train=str(home / "train.csv"), test=str(home / "test.csv"), **DATA)
        self.tokenizer, self.work = load_tokenizer(MODEL), work
        self.data: Prepared = prepare(spec, self.tokenizer)

    def batches(self, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Batches of training questions, spread over the set. A criterion of squared gradients wants one in each."""
        train = self.data.train
        assert train is not None
        rows = [train[i * len(train) // count] for i in range(count)]
        return [dict(self.data.collate(rows[i:i + size])) for i in range(0, count, size)]

    def folder(self, arm: Arm) -> Path:
        return self.work / arm.name

    def model(self, arm: Arm) -> nn.Module:
        return load_model(self.folder(arm))

    def make(self, arm: Arm) -> dict[str, Any]:
        """Prune and train the arm's model, save it, and score what was saved."""
        start, before = time.monotonic(), None
        if arm.how == "dense":
            model = load_model(MODEL, "classification", label_names=self.data.label_names)
            self._train(model, DENSE)
        else:
            model = self._smaller(arm)
            before = self.score(model)["accuracy"]
            self._train(model, AGAIN, Teacher(self.model(Arm("dense")), TEACH))
        save_model(model, self.folder(arm), self.tokenizer)
        row = self.score(self.model(arm))
        peer = {"version": version("torch-pruning")} if arm.how == "torch-pruning" else {}
        return {**row, **peer, "before_training": before, "seconds": round(time.monotonic() - start, 1)}

    def _smaller(self, arm: Arm) -> nn.Module:
        model = self.model(Arm("dense"))
        if arm.how == "torch-pruning":
            return torch_pruning(model, arm.level, self.batches(8, 8)[0], TOKENS)
        delta = attach(model, get("gates")(head="none"), "gates")
        if arm.how == "fisher":
            prune(delta, arm.level, "fisher", on="gates", allocation=Budget(tokens=TOKENS),
                  batches=self.batches(SCORED))
        else:
            prune(delta, arm.level, "magnitude", on="gates", by="weights", allocation="uniform")
        shrink(model)
        return model

    def _train(self, model: nn.Module, spec: TrainSpec, teacher: Teacher | None = None) -> None:
        delta = attach(model, get("full")(), "full")
        with tempfile.TemporaryDirectory() as folder:
            fit(delta, self.data.train, None, self.data.collate, None, spec, folder, objective=teacher)
        shrink(model)  # nothing is gone: it leaves the trained weights in the model

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy, loyalty to the dense model, numbers and multiply-adds."""
        found = predict(model, self.data.test, self.data.collate, by_length=True)
        row = dict(metrics("classification")(found.predictions, found.references))
        if self.folder(Arm("dense")).is_dir():
            row |= loyalty(self.dense, torch.as_tensor(found.predictions))
        return row | {"parameters": sum(p.numel() for p in model.parameters()),
                      "macs": count_macs(model, tokens=TOKENS).total}

    @cached_property
    def dense(self) -> Tensor:
        """What the dense model says of the test questions."""
        model = self.model(Arm("dense"))
        return torch.as_tensor(predict(model, self.data.test, self.data.collate, by_length=True).predictions)


def loyalty(dense: Tensor, logits: Tensor) -> dict[str, float]:
    """How far a model says what the dense one says."""
    return {"label_loyalty": label_loyalty(dense, logits), "probability_loyalty": probability_loyalty(dense, logits)}


def setting() -> dict[str, Any]:
    """What every arm gets."""
    return {"model": MODEL, "tokens": TOKENS, "scored": SCORED, "data": DATA, "teach": TEACH.model_dump(mode="json"),
            "dense": DENSE.model_dump(mode="json"), "again": AGAIN.model_dump(mode="json")}


def train(bench: Bench, arms: Iterable[Arm], found: dict[str, Any], out: Path) -> None:
    """Every arm that has no row or no model yet."""
    for arm in arms:
        if arm.name in found["arms"] and bench.folder(arm).is_dir():
            continue
        row = bench.make(arm)
        files = {"model": (bench.folder(arm) / "slimtune.safetensors").stat().st_size}
        found["arms"][arm.name] = {"how": arm.how, "level": arm.level, **row, "bytes": files}
        print(arm.name, found["arms"][arm.name], flush=True)
        record(out, found)


def deploy(bench: Bench, found: dict[str, Any]) -> None:
    """Score the int8 graphs of what was trained, and time it all. Errors: SlimtuneError for an arm without a model."""
    if lacking := [name for name in found["arms"] if not (bench.work / name).is_dir()]:
        raise SlimtuneError(f"{bench.work}: it has no model of {', '.join(lacking)}.",
                            "Give the folder with --work, or train first: --train.")
    made = {name: bench.work / name for name in found["arms"]}
    found["int8"] = {name: row | loyalty(bench.dense, logits)
                     for name, row, logits in quantised(made, bench.batches(8, 8)[0], bench.data)}
    found["latency"] = measure(made, bench.batches(32, 32)[0], TOKENS)


def main() -> None:
    """Train, time, and write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="only train, prune and score")
    parser.add_argument("--time", action="store_true", help="only time what was trained")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS])
    parser.add_argument("--text", default=TEXT, help="folder of the text sets")
    parser.add_argument("--work", type=Path, default=Path("runs/prune"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC, help="the page; its picture goes beside it")
    options = parser.parse_args()
    found = recorded(options.out, "setting", setting(), arms={}, latency={})
    arms = [arm for arm in ARMS if arm.name in options.arms]
    if not options.page:
        bench = Bench(options.text, options.work)
        if options.train or not options.time:
            train(bench, arms, found, options.out)
        if options.time or not options.train:
            deploy(bench, found)
            record(options.out, found)
    if found["arms"]:
        drawn = options.doc.with_suffix(".svg")
        text, picture = page(found, drawn.name)
        write_text(options.doc, text)
        write_text(drawn, picture)


if __name__ == "__main__":
    main()
