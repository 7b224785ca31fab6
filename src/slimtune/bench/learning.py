"""Does every method learn? One small budget for all, real reviews, a real encoder, beside two linear probes.

    python -m slimtune.bench.learning                                   # every method, and the page
    python -m slimtune.bench.learning lora ia3                          # these; the others' results are kept
    python -m slimtune.bench.learning lora --validate 1e-3 3e-3 1e-2    # rates on held-out training reviews
    python -m slimtune.bench.learning --seeds 5                         # the pooled probe with so many seeds

The encoder was trained with mean pooling: the pooler that the classifier reads is random. So every method
trains it with the head, and the baseline is the better of two probes: the head alone, and the head with the pooler.
"""
import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.bench.learning_page import page
from slimtune.bench.learning_settings import BUDGET, HELD_OUT, PROBES, SETTINGS, TOKENS, Setting
from slimtune.bench.results import record, recorded
from slimtune.core import Delta, attach
from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.examples import Examples, Prepared
from slimtune.errors import MethodError, SlimtuneError, listing, suggest
from slimtune.io.models import load_model, load_tokenizer
from slimtune.methods import AdapterFusion, get
from slimtune.recipe.folder import write_text
from slimtune.train import fit, predict

OUT, DOC = Path("benchmarks/results/learning.json"), Path("docs/learning.md")


@dataclass(frozen=True)
class Ground:
    """Model and data, loaded once: a delta that is detached leaves the model bitwise as it was."""

    model: nn.Module
    data: Prepared

    @classmethod
    def load(cls, held_out: float = 0.0) -> "Ground":
        """held_out: the share of the training reviews that is judged in place of the test reviews."""
        spec = DataSpec(task="classification", dataset="drugreview", max_length=TOKENS, validation_fraction=held_out)
        data = prepare(spec, load_tokenizer("minilm"))
        return cls(load_model("minilm", "classification", label_names=data.label_names), data)


def learn(name: str, ground: Ground, setting: Setting | None = None, seed: int = BUDGET.seed) -> dict[str, Any]:
    """Train a method within the budget and score it: on the held-out reviews if there are any, else on the test's.

    The model is left as it was. Errors: SlimtuneError for an unknown name; MethodError for a method that this
    encoder refuses.
    """
    if name not in SETTINGS:
        raise SlimtuneError(f"the learning test has no method '{name}'.", f"It has: {listing(SETTINGS)}",
                            suggest(name, SETTINGS))
    setting = setting or SETTINGS[name]
    delta = START.get(name, partial(_start, name.partition("+")[0]))(ground, setting)
    try:
        loss = _train(delta, ground.data.train, ground, setting, seed)
        judged = ground.data.validation or ground.data.test
        found = predict(ground.model, judged, ground.data.collate, by_length=True, precision=BUDGET.precision)
        counts = delta.count()
    finally:
        delta.detach()
    return {"rate": setting.rate, "head_rate": setting.head, "values": setting.values,
            "trained": counts.adapter + counts.norms, "train_loss": loss,
            **metrics("classification")(found.predictions, found.references)}


def _start(name: str, ground: Ground, setting: Setting) -> Delta:
    return attach(ground.model, get(name)(**{"pooler": True} | setting.values), name)


def _fusion(ground: Ground, setting: Setting) -> Delta:
    """The fusion of two adapters, each trained before in a budget of its own to tell one rating from the rest."""
    parts = []
    assert ground.data.train is not None
    for rating in ("negative", "positive"):
        label = ground.data.label_names.index(rating)
        rows = [row | {"labels": int(row["labels"] == label)} for row in ground.data.train.rows]
        parts.append(attach(ground.model, get("pfeiffer")(pooler=True), rating))
        _train(parts[-1], Examples("train", rows), ground, SETTINGS["pfeiffer"])
    values: dict[str, Any] = {"pooler": True} | setting.values
    fused = AdapterFusion.of(ground.model, [part.name for part in parts], **values)
    for part in parts:
        part.detach()
    return fused


START: dict[str, Callable[[Ground, Setting], Delta]] = {"adapter_fusion": _fusion}
"""Methods that need more than to be attached."""


def _train(delta: Delta, data: Any, ground: Ground, setting: Setting, seed: int = BUDGET.seed) -> float:
    """Fit, and return the mean training loss of the last ten steps."""
    rates = {"learning_rate": setting.rate, "head_learning_rate": setting.head}
    spec = BUDGET.model_copy(update={**rates, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        result = fit(delta, data, None, ground.data.collate, None, spec, folder)
    return [line["loss"] for line in result.history if "loss" in line][-1]


def budget() -> dict[str, Any]:
    """What every method gets, as the results hold it."""
    train = BUDGET.model_dump(mode="json", exclude={"learning_rate"})
    return {"train": train, "max_length": TOKENS, "held_out": HELD_OUT}


def main() -> None:
    """Run, keep each result as it comes, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="by default every method")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--validate", type=float, nargs="+", metavar="RATE", help="only try rates on held-out reviews")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="only the pooled probe, with N seeds")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    found = recorded(options.out, "budget", budget(), results={}, validation={}, probe_seeds=[])
    if options.seeds:
        found["probe_seeds"] = [learn(PROBES[1], Ground.load(), seed=seed)["macro_f1"] for seed in range(options.seeds)]
        record(options.out, found)
    elif not options.page:
        _run(options.methods or list(SETTINGS), options.validate, found, options.out)
    lacking = [name for name in PROBES if name not in found["results"]] + ([] if found["probe_seeds"] else ["--seeds"])
    if lacking:
        print(f"{options.doc}: not written; run {' and '.join(lacking)} as well.")
    else:
        write_text(options.doc, page(found))


def _run(chosen: Iterable[str], rates: Sequence[float] | None, found: dict[str, Any], out: Path) -> None:
    ground = Ground.load(HELD_OUT if rates else 0.0)
    for name in chosen:
        if rates:
            _validate(name, ground, rates, found["validation"].setdefault(name, []))
        else:
            found["results"][name] = _result(name, ground)
            print(name, found["results"][name], flush=True)
        found["results"] = dict(sorted(found["results"].items()))
        record(out, found)


def _validate(name: str, ground: Ground, rates: Iterable[float], tried: list[dict[str, float]]) -> None:
    """Add the macro-F1 of each rate on the held-out reviews."""
    steps = int(BUDGET.epochs) * math.ceil(len(ground.data.train or ()) / BUDGET.batch_size)
    for rate in rates:
        head = rate if name in PROBES else SETTINGS[name].head
        score = learn(name, ground, replace(SETTINGS[name], rate=rate, head=head))["macro_f1"]
        tried.append({"rate": rate, "head_rate": head, "steps": steps, "macro_f1": score})
        print(name, tried[-1], flush=True)


def _result(name: str, ground: Ground) -> dict[str, Any]:
    try:
        return learn(name, ground)
    except MethodError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    main()
