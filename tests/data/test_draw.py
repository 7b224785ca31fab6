"""Draws by class: as equal as can be, of any class sizes, and the same for a seed."""
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.data.draw import balanced, few
from slimtune.errors import DataError


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_a_balanced_draw_is_as_equal_as_can_be(classes, data):
    size = data.draw(st.integers(0, len(classes)))
    rows = balanced(classes, size, seed=3)
    assert rows == sorted(set(rows))
    assert len(rows) == size
    there, drawn = Counter(classes), Counter(classes[row] for row in rows)
    most = max(drawn.values(), default=0)
    assert all(drawn[name] >= min(there[name], most - 1) for name in there)
    assert rows == balanced(classes, size, seed=3)


def test_seeds_and_purposes_draw_differently():
    classes = [i % 4 for i in range(400)]
    draws = {tuple(balanced(classes, 40, seed, purpose)) for seed in (0, 1) for purpose in ("train_size", "test_size")}
    assert len(draws) == 4


def test_few_shots():
    classes = "aaabbbbc"
    assert [classes[row] for row in few(classes, 1, seed=0)] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"'c' has 1 \(1 classes have too few\).\n  Set data.shots=1 or less"):
        few(classes, 2, seed=0)
    with pytest.raises(DataError, match=r"data.train_size: 9 examples are asked for, and there are 8"):
        balanced(classes, 9, seed=0)
