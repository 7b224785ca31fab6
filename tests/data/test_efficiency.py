"""PPT and PE: the formula, and figures that V-PETL Bench prints."""
import math

import pytest

from slimtune.data.efficiency import pe, ppt
from slimtune.errors import DataError


@pytest.mark.parametrize(("score", "parameters", "printed"), [
    (0.6943, sum((10, 10, 10, 1, 1, 50, 5, 100, 100, 10, 1, 50, 200, 100, 50, 10, 50, 200, 200)) / 19 * 12 * 768, 0.68),
    (0.717, 2.38e6, 0.65)], ids=["vpt-deep", "lst"])
def test_printed_figures(score, parameters, printed):
    assert round(ppt(score, parameters), 2) == printed


@pytest.mark.parametrize(("score", "parameters", "printed"), [
    (0.6549, 87_878_739, 0.498), (0.6632, 29_523, 0.663), (0.6508, 1_237_587, 0.647), (0.6148, 176_979, 0.614),
    (0.6279, 77_907, 0.628), (0.6892, 79_699, 0.689)],
    ids=["full", "linear", "adapter", "lora", "compacter", "kadaptation"])
def test_elevaters_figures(score, parameters, printed):
    """Means over the 20 sets at 5 shots, of arXiv 2203.16329's README, as they are printed for PE."""
    assert pe(score, parameters) == pytest.approx(printed, abs=6e-4)


def test_the_formula():
    assert ppt(0.8, 0) == 0.8
    assert ppt(0.8, 9e7) == pytest.approx(0.8 / math.e)   # log10(9 + 1) = 1
    assert pe(0.8, 9e8) == pytest.approx(0.8 / math.e)
    assert pe(0.8, 99e8) == pytest.approx(0.8 / math.e**2)


def test_percents_are_refused():
    with pytest.raises(DataError, match="Percents are divided by 100"):
        ppt(69.4, 1e6)
    with pytest.raises(DataError):
        pe(0.5, -1)
