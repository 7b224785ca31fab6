"""The page of the learning test: its table, and the methods that are below the better probe."""
from collections.abc import Mapping
from typing import Any

from slimtune.bench.learning_settings import BUDGET, GRID, HEAD_RATE, HELD_OUT, PROBES, SETTINGS, TOKENS

HEAD = """# Every method learns

Made by `python -m slimtune.bench.learning`; do not edit. Figures: `benchmarks/results/learning.json`; the same runs
are tests: `pytest -m slow tests/bench/test_learning.py`.

600 training and 379 test reviews of the UCI drug review set, three ratings (two thirds are positive), cut to {tokens}
tokens; MiniLM-L6. One budget for all: {t.epochs:g} epochs of batch {t.batch_size}, AdamW, linear warm-up over a tenth,
linear decay, weight decay {t.weight_decay}, {t.precision} under autocast, seed {t.seed}; the last step is what is
scored. The classifier reads a pooler that this encoder never trained, so every method trains it with the head, both at
rate {head:g} if it is not said below. The bar is the better of two probes, the head alone and the head with the pooler:
macro-F1 {alone} and {pooled}. {beat} of {all} methods are above it, by the points of the last column. One seed, 379
reviews: two or three points between methods mean nothing.

Rates are of the grid {grid}. None was chosen on the test set: {share:.0%} of the training reviews were held
out for one or two methods of each family (last table), and the others take their family's.

"""
COLUMNS = ["| method | what is not the default | rate | trained beside pooler and head | last training loss | "
           "macro-F1 | accuracy | above the bar |", "|---|---|---|---|---|---|---|---|"]


def bar(results: Mapping[str, Any]) -> float:
    """The macro-F1 to beat: that of the better probe."""
    return max(results[name]["macro_f1"] for name in PROBES)


def above(results: Mapping[str, Any]) -> list[str]:
    """The methods that beat it, best first."""
    best = bar(results)
    found = [name for name, r in results.items() if name not in PROBES and r.get("macro_f1", 0.0) > best]
    return sorted(found, key=lambda name: -results[name]["macro_f1"])


def page(found: Mapping[str, Any]) -> str:
    """The document of the results: {"results": {method: ...}, "validation": {method: {rate: macro-F1}}}."""
    results: dict[str, Any] = found["results"]
    beat, best = above(results), bar(results)
    scored = [name for name, r in results.items() if "macro_f1" in r and name not in PROBES]
    below = sorted(set(scored) - set(beat), key=lambda name: -results[name]["macro_f1"])
    probes = {key: f"{results[name]['macro_f1']:.3f}" for key, name in zip(("alone", "pooled"), PROBES, strict=True)}
    top = HEAD.format(t=BUDGET, tokens=TOKENS, head=HEAD_RATE, beat=len(beat), all=len(scored), share=HELD_OUT,
                      grid=" ".join(f"{rate:g}" for rate in GRID), **probes)
    reasons = [f"- `{name}`: {SETTINGS[name].why}" for name in results if name not in (*beat, *PROBES)]
    tried = [f"| {name} | {', '.join(f'{rate}: {score:.3f}' for rate, score in rates.items())} |"
             for name, rates in sorted(found["validation"].items())]
    return top + "\n".join([
        *COLUMNS, *(_row(name, results[name], best) for name in (*PROBES, *beat, *below)),
        "", "## Not above the bar", "", *reasons,
        "", "## Rates tried on held-out training reviews", "", "| method | rate: macro-F1 |", "|---|---|", *tried, ""])


def _row(name: str, r: Mapping[str, Any], best: float) -> str:
    values = [f"{key}={value}" for key, value in r["values"].items()]
    if r["head_rate"] != HEAD_RATE:
        values.append(f"head at {r['head_rate']:g}")
    margin = "" if name in PROBES else f"{100 * (r['macro_f1'] - best):+.1f}"
    return (f"| {name} | {', '.join(values)} | {r['rate']:g} | {r['trained']:,} | {r['train_loss']:.3f} | "
            f"{r['macro_f1']:.3f} | {r['accuracy']:.3f} | {margin} |")
