"""docs/matrix.md: every method, every family, no blank, and the refusals of today."""
from pathlib import Path

import pytest

from slimtune.methods import get, names
from slimtune.testing import NAMES
from slimtune.testing.check import Pair, Report
from slimtune.testing.matrix import HEAD, PAGE, TICK, matrix, refusals

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_of_today():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == HEAD + matrix(refusals()), (
        "run: python -m slimtune.testing.matrix")


def test_no_cell_is_blank():
    rows = [line for line in (ROOT / PAGE).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["method", *NAMES]
    assert [row[0] for row in cells[2:]] == names()
    assert all(cell == TICK or cell.startswith("refused [") for row in cells[2:] for cell in row[1:])
    assert all(len(row) == len(NAMES) + 1 for row in cells)


def test_a_reason_is_told_once_and_a_missing_backbone_is_an_error():
    method = get("ia3")()
    one = Report(method, {"bert": Pair("bert"), "t5": Pair("t5", "no.")})
    text = matrix([one, one])
    assert text.count("refused [1]") == 2
    assert text.count("1. no.") == 1
    with pytest.raises(ValueError, match="ia3 was not checked on t5"):
        matrix([one, Report(method, {"bert": Pair("bert")})])
