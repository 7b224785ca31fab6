"""Every method learns real reviews on a real encoder better than the better of two linear probes."""
import json
from pathlib import Path

import pytest

from slimtune.bench.learning import Ground, learn
from slimtune.bench.learning_page import above, bar, page
from slimtune.bench.learning_settings import PROBES, SETTINGS
from slimtune.errors import MethodError
from slimtune.testing.tables import own

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks/results/learning.json").read_text())
RESULTS = FOUND["results"]


def test_every_method_has_settings_and_a_result():
    assert set(SETTINGS) == set(own()) | set(PROBES) == set(RESULTS)


def test_the_page_is_current():
    assert (ROOT / "docs/learning.md").read_text() == page(FOUND)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - set(PROBES)))
def test_the_result_is_of_these_settings_and_below_the_probes_only_with_a_reason(name: str):
    found, setting = RESULTS[name], SETTINGS[name]
    assert (name in above(RESULTS)) != bool(setting.why)
    if "refused" not in found:
        assert (found["rate"], found["head_rate"], found["values"]) == (setting.rate, setting.head, setting.values)


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground.load()


@pytest.fixture(scope="module")
def to_beat(ground: Ground) -> float:
    return bar({name: learn(name, ground) for name in PROBES})


SCORED = [n for n in SETTINGS if n not in PROBES and "refused" not in RESULTS[n]]
REFUSED = [n for n in SETTINGS if "refused" in RESULTS[n]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=SETTINGS[n].why)
                 if SETTINGS[n].why else ()) for n in SCORED])
def test_beats_the_probes(name: str, ground: Ground, to_beat: float):
    assert learn(name, ground)["macro_f1"] > to_beat


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_an_encoder_of_text(name: str, ground: Ground):
    with pytest.raises(MethodError):
        learn(name, ground)
