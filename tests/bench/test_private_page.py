"""The table of the private runs, and what its cells are runs of."""
import pytest

from slimtune.bench.private import LEVELS, recipe_of
from slimtune.bench.private_page import BEGIN, END, page

CELL = {"macro_f1": 0.7, "delta": 1e-5, "train_loss": 0.5, "counts": {"adapter": 2304, "head": 770}, "steps": 60,
        "examples": {"train": 60614, "test": 872}, "cpu_seconds": 80.0}


def test_a_row_has_mean_and_spread_and_what_people_wrote_stays():
    cells = {f"{level}/{seed}": CELL | {"accuracy": 0.7 + seed / 10, "sigma": 0.4, "epsilon": spent}
             for level, spent in (("none", None), ("3", 2.996)) for seed in (1, 0)}
    found = {"budget": {"levels": LEVELS, "max_length": 32, "privacy": {"batch_size": 500, "accountant": "prv"}},
             "cells": cells}
    text = page(found, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 3 | 3.00 | 0.400 | 0.750 ± 0.071 | 0.700 0.800 | 0.700 | 0.500 |" in text
    assert "| none | no promise |" in text
    assert "| 8 |" not in text
    assert page(found, text) == text


@pytest.mark.parametrize("level", LEVELS)
def test_the_cells_differ_in_what_is_promised_alone(level):
    one, other = recipe_of(level, 1).resolved(), recipe_of("8", 1).resolved()
    assert one.pop("privacy") | {"epsilon": 0, "noise_multiplier": 0, "clip": 0} == other.pop("privacy") | {
        "epsilon": 0, "noise_multiplier": 0, "clip": 0}
    assert one == other
