"""The page of the SparseAdapter benchmark: one row an arm, mean and spread over seeds, and what it says."""
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from slimtune.bench.page import spread

HEAD = """# SparseAdapter: adapters pruned before they are trained

Made by `python -m slimtune.bench.sparse_adapter`; do not edit. Figures: `benchmarks/results/sparse_adapter.json`.

Houlsby adapters of {b[bottleneck]} units (1x) on MiniLM-L6, {shots} questions of each of the 77 intents of banking77,
{test} test questions; {t[epochs]:g} epochs of batch {t[batch_size]}, AdamW at {t[learning_rate]:g} (head and pooler,
which all arms train, at {t[head_learning_rate]:g}), {t[precision]} under autocast; the last step is scored. Scores of
weights come from {scored} training questions. Only the down and up matrices are pruned, one threshold for all
(`global`); the share is of those. Rates were set once for the dense adapter and are the same for all. Test accuracy in
%, mean and standard deviation over {seeds} seeds of new weights; the standard error of the test questions, which are
the same for all, is about {error:.1f} points.

| adapter | weights of the matrices that live | trained numbers | accuracy | against 1x dense, seed by seed |
|---|---|---|---|---|
"""

NONE = "head and pooler alone"


def page(found: Mapping[str, Any]) -> str:
    """The document of the results: {"budget": ..., "cells": {"title of an arm/seed": {...}}}."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for key, cell in found["cells"].items():
        arms.setdefault(key.rpartition("/")[0], []).append(cell)
    dense = {c["seed"]: 100 * c["accuracy"] for c in arms.get("1x dense", [])}
    rows = [_row(title, cells, dense) for title, cells in sorted(arms.items(), key=lambda arm: arm[0] != NONE)]
    budget = found["budget"]
    accuracy = mean(dense.values()) if dense else 50.0
    head = HEAD.format(b=budget, t=budget["train"], shots=budget["data"]["shots"],
                       test=f"{budget['data']['test_size']:,}", scored=budget["scored"], seeds=len(dense),
                       error=100 * (accuracy / 100 * (1 - accuracy / 100) / budget["data"]["test_size"]) ** 0.5)
    return head + "\n".join(rows) + "\n" + _answers(arms, dense)


def _gains(cells: list[dict[str, Any]], dense: Mapping[int, float]) -> list[float]:
    return [100 * c["accuracy"] - dense[c["seed"]] for c in cells if c["seed"] in dense]


def _row(title: str, cells: list[dict[str, Any]], dense: Mapping[int, float]) -> str:
    gains = _gains(cells, dense)
    kept = cells[0]["kept"]
    living = "none" if title == NONE else "all" if kept is None else f"{kept:,}"
    return (f"| {title} | {living} | {cells[0]['trainable']:,} | "
            f"{spread([100 * c['accuracy'] for c in cells], 1)} | "
            f"{'' if title == '1x dense' else spread(gains, 1, '+') if gains else ''} |")


def _answers(arms: Mapping[str, list[dict[str, Any]]], dense: Mapping[int, float]) -> str:
    """What the paper asks, answered by the table."""
    if not {"1x snip 40%", "2x snip 50%", "4x snip 75%"} <= set(arms):
        return ""
    lines = ["", "What the paper claims, here:", ""]
    for claim, title in (("SNIP at 40 % is at least as good as dense", "1x snip 40%"),
                         ("Large-Sparse, 2x at 50 %, beats the dense adapter of as many weights", "2x snip 50%"),
                         ("Large-Sparse, 3x at 67 %", "3x snip 67%"), ("Large-Sparse, 4x at 75 %", "4x snip 75%")):
        if gains := _gains(arms.get(title, []), dense):
            lines.append(f"- {claim}: {spread(gains, 1, '+')} points: {_verdict(gains)}.")
    best = max(arms, key=lambda t: mean(c["accuracy"] for c in arms[t]))
    lines.append(f"- The best row is {best}.")
    return "\n".join(lines) + "\n"


def _verdict(gains: list[float]) -> str:
    if len(gains) < 2:
        return "one seed tells nothing"
    error = stdev(gains) / len(gains) ** 0.5
    if mean(gains) > 2 * error:
        return "holds"
    return "does not hold" if mean(gains) < -2 * error else "equal within the spread of the seeds"
