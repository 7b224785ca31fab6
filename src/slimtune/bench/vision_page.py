"""The table of the vision benchmark, between two marks of its page; what people wrote around it stays."""
from collections.abc import Mapping
from statistics import mean
from typing import Any

from slimtune.bench.page import renewed, spread
from slimtune.bench.vision_settings import ABOUT, BUDGET, HELD_OUT, SETS, SETTINGS, SIZE

BEGIN, END = "<!-- results: made by python -m slimtune.bench.vision -->", "<!-- end of results -->"


def page(found: Mapping[str, Any], text: str) -> str:
    """The page with its table renewed. Errors: SlimtuneError for a page that is not empty and lacks the marks."""
    return renewed(text, (BEGIN, END), results(found))


def results(found: Mapping[str, Any]) -> str:
    """The table: a row a method, test accuracy on each set as mean and spread over the seeds, and their mean.

    found: {"cells": {"set/title/seed": {"accuracy": ..., "trained": ..., "head": ..., "seconds": ...}}}.
    """
    cells: dict[str, Any] = found["cells"]
    sets = [name for name in SETS if any(key.startswith(f"{name}/") for key in cells)]
    sizes = {name: next(cell["examples"]["judged"] for key, cell in cells.items() if key.startswith(f"{name}/"))
             for name in sets}
    head = ["method", "what is not the default", "rate", "trained beside the head",
            *(f"{name} ({ABOUT[name]}, {sizes[name]} test)" for name in sets), "mean", "seconds a cell"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = [_row(title, cells, sets) for title in SETTINGS if any(key.split("/")[1] == title for key in cells)]
    return "\n".join([*lines, *rows, "", _note(found)])


def _row(title: str, cells: Mapping[str, Any], sets: list[str]) -> str:
    setting = SETTINGS[title]
    values = ", ".join(f"{key}={value}" for key, value in setting.values.items())
    if setting.epochs != BUDGET.epochs:
        values = ", ".join(filter(None, [values, f"{setting.epochs:g} epochs on cached features"]))
    own = {name: [cell for key, cell in cells.items() if key.startswith(f"{name}/{title}/")] for name in sets}
    every = [cell for group in own.values() for cell in group]
    whole = all(own.values())
    return "| " + " | ".join([
        title, values, f"{setting.rate:g}", f"{every[0]['trained']:,}",
        *(_of_seeds([cell["accuracy"] for cell in own[name]]) for name in sets),
        f"{mean(mean(cell['accuracy'] for cell in own[name]) for name in sets):.3f}" if whole else "",
        f"{mean(cell['seconds'] for cell in every):.0f}"]) + " |"


def _of_seeds(values: list[float]) -> str:
    """Mean and spread, and of how many seeds; nothing of none."""
    return f"{spread(values)} ({len(values)})" if values else ""


def _note(found: Mapping[str, Any]) -> str:
    env, rates = found.get("environment", {}), found.get("validation", {})
    tried = [f"| {title} | " + " | ".join(
        ", ".join(f"{rate}: {score['accuracy']:.3f}" for rate, score in rates[title].get(name, {}).items())
        for name in SETS) + " |" for title in SETTINGS if any(rates.get(title, {}).values())]
    train, cpu = BUDGET, env.get("cpu", "an unnamed CPU")
    told = ("Test accuracy after the last epoch: mean ± sample standard deviation (seeds). Images are "
            f"{SIZE} x {SIZE}; {train.epochs:g} epochs of batch {train.batch_size}, AdamW, weight decay "
            f"{train.weight_decay}, warm-up over a tenth, cosine to 0, head at {train.head_learning_rate:g} (linear: "
            f"at its rate), {train.precision}, one thread of {cpu}. A seed draws the head, the order, the "
            "training images and, of sets in one file, the test split.")
    if not tried:
        return told
    return "\n".join([told, "", f"Rates tried on {HELD_OUT:.0%} of the training images of seed 0, accuracy there:", "",
                      "| method | " + " | ".join(SETS) + " |", "|---" * (len(SETS) + 1) + "|", *tried])
