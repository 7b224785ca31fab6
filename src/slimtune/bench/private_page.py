"""The table of the private runs, between two marks of docs/privacy.md; what people wrote around it stays."""
from collections.abc import Mapping
from statistics import mean
from typing import Any

from slimtune.bench.page import renewed, spread

BEGIN, END = "<!-- results: made by python -m slimtune.bench.private -->", "<!-- end of results -->"


def page(found: Mapping[str, Any], text: str) -> str:
    """The page with its table renewed. Errors: SlimtuneError for a page that is not empty and lacks the marks."""
    return renewed(text, (BEGIN, END), results(found))


def results(found: Mapping[str, Any]) -> str:
    """A row a level: epsilon, sigma, and test accuracy as mean, deviation and each seed's.

    found: {"cells": {"level/seed": {"accuracy": ..., "macro_f1": ..., "epsilon": ..., "sigma": ...}}}.
    """
    cells: dict[str, Any] = found["cells"]
    lines = ["| epsilon asked | spent | sigma | test accuracy | each seed | macro-F1 | training loss at the end |",
             "|---|---|---|---|---|---|---|"]
    for level in found["budget"]["levels"]:
        own = {int(key.rpartition("/")[2]): cell for key, cell in cells.items() if key.startswith(f"{level}/")}
        if own:
            lines.append(_row(level, [own[seed] for seed in sorted(own)]))
    return "\n".join([*lines, "", _note(found)])


def _row(level: str, own: list[dict[str, Any]]) -> str:
    scores = [cell["accuracy"] for cell in own]
    spent = own[0]["epsilon"]
    return "| " + " | ".join([
        level, "no promise" if spent is None else f"{spent:.2f}", f"{own[0]['sigma']:.3f}", spread(scores),
        " ".join(f"{s:.3f}" for s in scores), f"{mean(c['macro_f1'] for c in own):.3f}",
        f"{mean(c['train_loss'] for c in own):.3f}"]) + " |"


def _note(found: Mapping[str, Any]) -> str:
    budget, one = found["budget"], next(iter(found["cells"].values()))
    seconds = [cell["cpu_seconds"] for cell in found["cells"].values()]
    counts, cpu = one["counts"], found.get("environment", {}).get("cpu", "an unnamed CPU")
    return (f"SST-2, {one['examples']['train']:,} phrases for training and {one['examples']['test']} sentences for the "
            f"test, cut to {budget['max_length']} tokens; {one['steps']} steps of {budget['privacy']['batch_size']} "
            f"examples on average; {counts['adapter']:,} numbers and a head of {counts['head']:,}; delta "
            f"{one['delta']:g}, counted by {budget['privacy']['accountant']}; the last step is scored; mean ± sample "
            f"standard deviation. A cell takes {min(seconds):.0f} to {max(seconds):.0f} s of one thread of {cpu}.")
