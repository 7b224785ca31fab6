"""DSEE on real sentences: what its sparse update, and the sparse weights below it, cost and keep.

    python -m slimtune.bench.dsee                 # every cell that is not done, and the page
    python -m slimtune.bench.dsee --minutes 30    # as many as fit, seed by seed; run it again to go on
    python -m slimtune.bench.dsee --page          # the page alone

The rates of the updates and the l1 weight are chosen first, on validation phrases, and then stand for all seeds. The
sentences are SST-2's: --text FOLDER, else SLIMTUNE_TEXT.
"""
import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimtune.bench.dsee_page import page
from slimtune.bench.results import record, recorded
from slimtune.core import Delta, Method, attach
from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.examples import Prepared
from slimtune.io.model_folder import save_model
from slimtune.io.models import load_model, load_tokenizer
from slimtune.methods import get
from slimtune.recipe.folder import write_text
from slimtune.sparsity.dsee import dsee_structured, dsee_unstructured
from slimtune.sparsity.macs import count_macs
from slimtune.sparsity.prune import Sparsity, prune
from slimtune.sparsity.shrink import shrink
from slimtune.sparsity.target import targets
from slimtune.train import TrainSpec, fit, predict

OUT, DOC = Path("benchmarks/results/dsee.json"), Path("docs/dsee.md")
TEXT = os.environ.get("SLIMTUNE_TEXT", "../shared/data/text")
MODEL, TOKENS, SEEDS = "minilm", 128, (0, 1, 2)
RANK, ENTRIES, HALF, HEADS, NEURONS = 8, 64, 0.5, 3, 0.25
DATA: dict[str, Any] = {"text": "sentence", "max_length": 32}
STAGE = TrainSpec(steps=100, batch_size=32, learning_rate=1e-4, head_learning_rate=1e-4, weight_decay=0.01, warmup=0.1,
                  precision="bfloat16", save_every=10**6, threads=1)
"""One of the two stages; what has no second stage trains twice as long at once."""
Rates = tuple[float, float]
"""Of what is trained, and of the head and pooler."""
FULL: Rates = (1e-4, 1e-4)
"""Set beforehand, and not tried against others here."""
RATES_TRIED: tuple[Rates, ...] = ((1e-3, 3e-3), (3e-3, 1e-2))
L1_TRIED = (1e-5, 1e-4)
CHOSEN_ON, PHRASES = 100, 1500
"""The seed of the choice, and how many validation phrases."""


@dataclass(frozen=True)
class Arm:
    """What is attached, at which rates it is trained, and how weights are masked between the two stages."""

    title: str
    parts: tuple[Method, ...]
    rates: Rates
    cut: Callable[[Delta], Sparsity] | None = None


def arms(rates: Rates, l1: float) -> list[Arm]:
    """Every row of the table. rates: of the updates; l1: weight of heads' and neurons' coefficients in the loss."""
    scale = {"rank": RANK, "alpha": 2.0 * RANK, "pooler": True}
    dsee, full = get("dsee")(nonzero=ENTRIES, **scale), get("full")()
    lora, gates = get("lora")(sites=("attn.q", "attn.v"), **scale), get("gates")(l1=l1)
    return [Arm("full fine-tuning", (full,), FULL),
            Arm("full, magnitude 50%", (full,), FULL, lambda d: prune(d, HALF, "magnitude", on="base")),
            Arm("LoRA", (lora,), rates), Arm("DSEE", (dsee,), rates),
            Arm("DSEE, S1 50%", (dsee,), rates, lambda d: dsee_unstructured(d, HALF)),
            Arm("DSEE, S1 50% by magnitude", (dsee,), rates, lambda d: dsee_unstructured(d, HALF, mode="W")),
            Arm("DSEE, 3 heads and 25% neurons", (dsee, gates), rates, lambda d: dsee_structured(d, HEADS, NEURONS))]


def load(text: str) -> Prepared:
    """SST-2: training phrases, the validation phrases and the test sentences."""
    home = Path(text) / "sst2"
    files = {"train": str(home / "train.tsv"), "validation": str(home / "dev.tsv"), "test": str(home / "test.tsv")}
    return prepare(DataSpec(task="classification", **files, **DATA), load_tokenizer(MODEL))


def learn(arm: Arm, data: Prepared, seed: int, judged: Any) -> dict[str, Any]:
    """Train the arm, mask and train again where it says so, fold it into the model, and score what is deployed."""
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the head and the pooler
        model = load_model(MODEL, "classification", label_names=data.label_names)
    delta = attach(model, list(arm.parts), "dsee", seed=seed)
    spec = STAGE.model_copy(update=dict(zip(("learning_rate", "head_learning_rate"), arm.rates, strict=True)))
    dense = count_macs(model, tokens=TOKENS).total
    with tempfile.TemporaryDirectory() as folder:
        home, sparsity = Path(folder), None
        if arm.cut is None:
            loss = _train(delta, data, spec.model_copy(update={"steps": 2 * int(spec.steps or 0), "seed": seed}), home)
        else:
            _train(delta, data, spec.model_copy(update={"seed": seed}), home / "one")
            sparsity = arm.cut(delta).as_dict()
            loss = _train(delta, data, spec.model_copy(update={"seed": seed + 1000}), home / "two")
        count, less = delta.count(), _skipped(delta)
        delta.save(home / "delta")
        small = shrink(model)
        save_model(model, home / "model")
        executed = count_macs(model, tokens=TOKENS).total
        sizes = {"delta": _bytes(home / "delta"), "model": _bytes(home / "model")}
    found = predict(model, judged, data.collate, by_length=True)
    return {**metrics("classification")(found.predictions, found.references), "trained": count.adapter,
            "head": count.head, "sparsity": sparsity, "bytes": sizes, "dense_macs": dense, "executed_macs": executed,
            "theoretical_macs": executed - TOKENS * less, "parameters": small.parameters[1],
            "folding_changed": small.difference, "train_loss": loss,
            "cpu_seconds": round(time.process_time() - start, 1)}


def _train(delta: Delta, data: Prepared, spec: TrainSpec, folder: Path) -> float:
    assert data.train is not None
    done = fit(delta, data.train, None, data.collate, None, spec, folder)
    return [line["loss"] for line in done.history if "loss" in line][-1]


def _skipped(delta: Delta) -> int:
    """Multiplications a token that a kernel saves which skips masked weights; the update then stays beside them."""
    base = targets(delta, "base")
    gone = sum(int((~mask).sum()) for name, mask in delta.masks.items() if name in base)
    beside = sum(p.numel() for name, p in delta.named_parameters() if ".dsee" in name)
    return gone - beside if gone else 0


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def setting() -> dict[str, Any]:
    """What every cell gets."""
    return {"model": MODEL, "data": DATA, "tokens": TOKENS, "rank": RANK, "entries": ENTRIES, "half": HALF,
            "heads": HEADS, "neurons": NEURONS, "full": FULL, "rates_tried": RATES_TRIED, "l1_tried": L1_TRIED,
            "phrases": PHRASES, "chosen_on": CHOSEN_ON,
            "stage": STAGE.model_dump(mode="json", exclude={"seed", "learning_rate", "head_learning_rate"})}


def choose(data: Prepared, found: dict[str, Any], out: Path) -> list[Arm]:
    """The arms at the rates and the l1 weight that are best on validation phrases; what was tried is kept."""
    assert data.validation is not None
    judged = [data.validation[i * len(data.validation) // PHRASES] for i in range(PHRASES)]
    by_rates = {f"LoRA, rates {own:g} and {head:g}": (own, head) for own, head in RATES_TRIED}
    rates = by_rates[_best({name: arms(own, 0.0)[2] for name, own in by_rates.items()}, data, judged, found, out)]
    by_l1 = {f"{arms(rates, l1)[-1].title}, l1 {l1:g}": l1 for l1 in L1_TRIED}
    l1 = by_l1[_best({name: arms(rates, own)[-1] for name, own in by_l1.items()}, data, judged, found, out)]
    found["chosen"] = {"rates": list(rates), "l1": l1}
    return arms(rates, l1)


def _best(tried: dict[str, Arm], data: Prepared, judged: Any, found: dict[str, Any], out: Path) -> str:
    scores = found["validation"]
    for name, arm in tried.items():
        if name not in scores:
            cell = learn(arm, data, CHOSEN_ON, judged)
            scores[name] = cell["accuracy"]
            print(name, {k: cell[k] for k in ("accuracy", "train_loss", "cpu_seconds")}, flush=True)
            record(out, found)
    return max(tried, key=lambda name: scores[name])


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
    found = recorded(options.out, "setting", setting(), validation={}, chosen={}, cells={})
    until = time.monotonic() + 60 * options.minutes
    if not options.page:
        data = load(options.text)
        made = choose(data, found, options.out)
        for seed, arm in [(s, a) for s in options.seeds for a in made if f"{a.title}/{s}" not in found["cells"]]:
            if time.monotonic() > until:
                print("the time is up; run it again to go on", flush=True)
                break
            cell = found["cells"][f"{arm.title}/{seed}"] = {"seed": seed, **learn(arm, data, seed, data.test)}
            print(arm.title, seed, {k: cell[k] for k in ("accuracy", "train_loss", "cpu_seconds")}, flush=True)
            record(options.out, found)
    if found["cells"]:
        write_text(options.doc, page(found))


if __name__ == "__main__":
    main()
