"""Loyalty against scipy's Jensen-Shannon distance, and by hand."""
import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from slimtune.data.loyalty import label_loyalty, probability_loyalty
from slimtune.errors import DataError


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_probability_loyalty_is_one_less_scipys_distance(classes, scale):
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(2, 40, classes, generator=g, dtype=torch.float64) * scale
    distances = [jensenshannon(p, q, base=2) for p, q in zip(t.softmax(-1).numpy(), s.softmax(-1).numpy(), strict=True)]
    assert probability_loyalty(t, s) == pytest.approx(1 - sum(distances) / len(distances), abs=1e-12)


def test_probability_loyalty_by_hand():
    """P = (1, 0), Q = (1/2, 1/2): M = (3/4, 1/4), JS = (log2(4/3) + (log2(2/3) + log2 2) / 2) / 2 = 0.3113 bits."""
    t, s = torch.tensor([[1e4, 0.0]]), torch.zeros(1, 2)
    divergence = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    assert probability_loyalty(t, s) == pytest.approx(1 - math.sqrt(divergence), abs=1e-9)
    assert probability_loyalty(t, s) == probability_loyalty(s, t)
    assert probability_loyalty(t, -t) == pytest.approx(0, abs=1e-12)
    assert probability_loyalty(t + 3, t) == pytest.approx(1)


def test_label_loyalty_counts_equal_choices():
    t = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 5.0, 0.0], [9.0, 0.0, 0.0]])
    assert label_loyalty(t, t * 7 + 1) == 1.0
    assert label_loyalty(t, t[[0, 2, 3, 1]]) == 0.5


@pytest.mark.parametrize("score", [label_loyalty, probability_loyalty])
def test_outputs_that_cannot_be_compared(score):
    for t, s in ((torch.zeros(2, 3), torch.zeros(3, 3)), (torch.zeros(2, 1), torch.zeros(2, 1)),
                 (torch.zeros(0, 3), torch.zeros(0, 3)), (torch.zeros(4), torch.zeros(4))):
        with pytest.raises(DataError, match="loyalty compares"):
            score(t, s)
    with pytest.raises(DataError, match="NaN"):
        score(torch.full((1, 2), float("nan")), torch.zeros(1, 2))
