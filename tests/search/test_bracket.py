"""The smallest number that passes, against trying them all."""
import pytest

from slimtune.search.bracket import smallest, tries


@pytest.mark.parametrize("start", [1, 3, 8])
@pytest.mark.parametrize("most", [1, 8, 60, 64])
def test_with_bisections_enough_it_is_the_very_number(start: int, most: int):
    for threshold in range(1, 70):
        asked = []
        found = smallest(lambda d, t=threshold, a=asked: a.append(d) or d >= t, start, most, 10)
        assert found == (threshold if threshold <= most else None)
        assert len(asked) <= tries(start, most, 10)
        assert len(set(asked)) == len(asked)
        assert max(asked) <= most


@pytest.mark.parametrize(("bisections", "wanted"), [(0, 64), (1, 48), (2, 40), (3, 40), (4, 38), (5, 37)])
def test_each_bisection_halves_what_is_not_known(bisections: int, wanted: int):
    assert smallest(lambda d: d >= 37, 1, 1000, bisections) == wanted
