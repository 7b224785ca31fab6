"""The bookkeeping of a measurement, on a clock of our own: nothing here is timed."""
import sys

import pytest
import torch

from slimtune.compress.latency import latency, turns
from slimtune.errors import SlimtuneError


class Clock:
    """Seconds that pass only in contenders; the CPU works half of them."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


def test_percentiles_and_ratios(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys.modules["slimtune.compress.latency"], "time", clock)
    slow, fast = iter([99.0, *range(1, 11)]), iter([99.0, *(n / 2 for n in range(1, 11))])

    def passes(seconds):
        def run():
            clock.now += next(seconds)
        return run

    found = latency({"slow": passes(slow), "fast": passes(fast)}, rounds=10, warmup=1, batch=8, sequence=64, kind="x")
    assert found.wall["slow"].p50 == pytest.approx(5500)
    assert found.wall["slow"].p10 == pytest.approx(1900)
    assert found.wall["slow"].p90 == pytest.approx(9100)
    assert found.cpu["slow"].p50 == pytest.approx(2750)
    assert found.speedup == pytest.approx({"slow": 1.0, "fast": 2.0})
    assert found.cpu_speedup == pytest.approx({"slow": 1.0, "fast": 2.0})
    assert (found.setting["batch"], found.setting["sequence"], found.setting["kind"]) == (8, 64, "x")
    assert found.setting["threads"] == torch.get_num_threads()
    assert found.setting["versions"]["torch"] == torch.__version__
    assert found.as_dict()["wall"]["fast"]["p50"] == pytest.approx(2750)
    assert "2.00x" in str(found)


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd"])
def test_every_contender_stands_in_every_place(names):
    rows = [turns(names, turn) for turn in range(2 * len(names))]
    for place in range(len(names)):
        assert sorted(row[place] for row in rows) == sorted(names * 2)


def test_nothing_to_measure():
    with pytest.raises(SlimtuneError, match="0 contenders"):
        latency({})
    with pytest.raises(SlimtuneError, match="0 rounds"):
        latency({"a": int}, rounds=0)
