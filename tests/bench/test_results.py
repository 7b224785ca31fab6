"""Results on disk: read back only for their setting, so that no other's are written over; and a page's made part."""
import json

import pytest

from slimtune.bench.page import renewed
from slimtune.bench.prune import Bench, deploy
from slimtune.bench.results import record, recorded
from slimtune.errors import SlimtuneError

MARKS = ("<!-- a -->", "<!-- b -->")


def test_results_of_another_setting_are_neither_read_nor_lost(tmp_path):
    path = tmp_path / "found.json"
    found = recorded(path, "budget", {"model": "a", "rates": (1, 2)}, cells={})
    assert found == {"budget": {"model": "a", "rates": [1, 2]}, "cells": {}}
    found["cells"]["x"] = 0.5
    record(path, found)
    again = recorded(path, "budget", {"model": "a", "rates": (1, 2)}, cells={})
    assert again == found
    assert again["environment"]["packages"]["torch"]
    with pytest.raises(SlimtuneError, match="another budget: rates, size") as caught:
        recorded(path, "budget", {"model": "a", "rates": (1,), "size": 3}, cells={})
    assert "--out" in str(caught.value)
    assert json.loads(path.read_text())["cells"] == {"x": 0.5}


@pytest.mark.parametrize("page", ["mine", MARKS[0], "".join(MARKS) * 2, f"{MARKS[1]} {MARKS[0]} {MARKS[1]}"])
def test_a_page_without_one_pair_of_marks_is_refused(page):
    with pytest.raises(SlimtuneError, match="one pair of marks"):
        renewed(page, MARKS, "table")


def test_an_empty_page_gets_the_marks():
    assert renewed("", MARKS, "table\n") == f"{MARKS[0]}\ntable\n{MARKS[1]}\n"


def test_models_that_are_not_there_are_not_timed_away(tmp_path):
    bench = Bench.__new__(Bench)
    bench.work = tmp_path
    found = {"arms": {"dense": {}}, "int8": {"dense": {}}, "latency": {"1": {}}}
    with pytest.raises(SlimtuneError, match="no model of dense"):
        deploy(bench, found)
    assert found["latency"] == {"1": {}}
