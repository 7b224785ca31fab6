"""The page of the DSEE benchmark: one row an arm, and what the paper asks, answered by it."""
from collections.abc import Mapping
from statistics import mean
from typing import Any

from slimtune.bench.page import spread

HEAD = """# DSEE: a sparse update on sparse weights

Made by `python -m slimtune.bench.dsee`; do not edit. Figures: `benchmarks/results/dsee.json`.

MiniLM-L6 on SST-2, phrases of at most {s[data][max_length]} tokens, batch {t[batch_size]}, {t[precision]} under
autocast. A stage is {t[steps]} steps; masks are drawn after the first, and what has no mask trains {double} steps at
once. LoRA and DSEE have rank {s[rank]} on query and value, DSEE {s[entries]} entries of S2 a map besides; all train
head and pooler. The rates of updates ({rates[0]:g}, head and pooler {rates[1]:g}) and the l1 weight of the coefficients
({l1:g}) were chosen on {s[phrases]:,} validation phrases; that of full fine-tuning ({s[full][0]:g}) was set
beforehand. Test accuracy in % of what is deployed, folded and sliced; mean and standard deviation over {seeds}; the
standard error of the 872 sentences, the same for all, is about {error:.1f} points.

S1 at 50 % masks half of the maps that the update does not touch by magnitude, and half of query and value by the size
of the update itself; "by magnitude" draws both by magnitude. Files: `delta` is what a task adds to the backbone (masks
are a bit a weight), `model` the deployed model whole, float32. MACs are of {s[tokens]} tokens: `executed` by dense
kernels, `skipping zeros` if a kernel skipped every masked weight; the update then stays beside the weights, for folded
in it fills the zeros. A mask alone makes no kernel execute less.

| | trained, head apart | delta, MB | model, MB | MACs executed | skipping zeros | accuracy | against full, by seed |
|---|---|---|---|---|---|---|---|
"""
FULL, LORA, DSEE, S1 = "full fine-tuning", "LoRA", "DSEE", "DSEE, S1 50%"
CUT = "DSEE, 3 heads and 25% neurons"


def page(found: Mapping[str, Any]) -> str:
    """The document of the results: {"setting", "validation", "chosen", "cells": {"title of an arm/seed": {...}}}."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, cell in found["cells"].items():
        rows.setdefault(key.rpartition("/")[0], []).append(cell)
    setting, seeds = found["setting"], max(map(len, rows.values()))
    accuracy = mean(c["accuracy"] for cells in rows.values() for c in cells)
    head = HEAD.format(s=setting, t=setting["stage"], double=2 * setting["stage"]["steps"], **found["chosen"],
                       seeds=f"{seeds} seeds" if seeds > 1 else "one seed, which tells no small difference",
                       error=100 * (accuracy * (1 - accuracy) / 872) ** 0.5)
    return head + "\n".join(_row(title, rows) for title in rows) + "\n" + _answers(rows) + _chosen(found["validation"])


def _row(title: str, rows: Mapping[str, list[dict[str, Any]]]) -> str:
    first, gains = rows[title][0], _gains(rows, title, FULL)
    executed, skipping = (f"{first[name]:,} ({first[name] / first['dense_macs']:.1%})"
                          for name in ("executed_macs", "theoretical_macs"))
    against = spread(gains, 1, "+") if gains and title != FULL else ""
    return (f"| {title} | {first['trained']:,} | {first['bytes']['delta'] / 1e6:.2f} | "
            f"{first['bytes']['model'] / 1e6:.1f} | {executed} | {skipping} | "
            f"{spread([100 * c['accuracy'] for c in rows[title]], 1)} | {against} |")


def _gains(rows: Mapping[str, list[dict[str, Any]]], title: str, other: str) -> list[float]:
    """Accuracy of one over another, in points, seed by seed."""
    base = {c["seed"]: c["accuracy"] for c in rows.get(other, [])}
    return [100 * (c["accuracy"] - base[c["seed"]]) for c in rows.get(title, []) if c["seed"] in base]


def _answers(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = ["", "What the paper asks, here, in points of accuracy:", ""]
    for question, one, other in (
            ("Does S2 add to LoRA of equal rank", DSEE, LORA),
            ("What does half of the weights below the update cost", S1, DSEE),
            ("Is a mask of query and value by the update better than one by magnitude", S1, f"{S1} by magnitude"),
            ("The same share of zeros, DSEE over full fine-tuning with magnitude pruning", S1, "full, magnitude 50%"),
            ("What do a quarter of heads and neurons cost", CUT, DSEE)):
        if gains := _gains(rows, one, other):
            lines.append(f"- {question}? {spread(gains, 1, '+')}.")
    return "\n".join(lines) + "\n"


def _chosen(validation: Mapping[str, float]) -> str:
    if not validation:
        return ""
    lines = ["", "Validation accuracy of what was tried, one seed of its own:", ""]
    return "\n".join([*lines, *(f"- {name}: {100 * value:.1f}" for name, value in validation.items())]) + "\n"
