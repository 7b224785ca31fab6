"""Schedules against the tables of the papers' code, to 1e-6."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

import slimtune as st
from slimtune.errors import RecipeError
from slimtune.sparsity.prune import prune_in_rounds
from slimtune.sparsity.schedule import Cubic, cubic, geometric, iterative, rewound
from slimtune.testing import batch, tiny

OFA = Cubic(begin=0, end=50_000, until=80_000, every=1000)


@pytest.mark.parametrize(("final", "table"), [
    (0.9, {1000: 0.052927, 5000: 0.2439, 10_000: 0.4392, 20_000: 0.7056, 25_000: 0.7875, 30_000: 0.8424,
           40_000: 0.8928, 50_000: 0.9, 99_999: 0.9}),
    (0.85, {0: 0.0, 10_000: 0.4148, 25_000: 0.74375, 40_000: 0.8432})])
def test_prune_once_for_alls_ramp(final, table):
    ramp = OFA.ramp(100_000, final)
    assert {t: ramp.at(t) for t in table} == pytest.approx(table, abs=1e-6)


def test_masks_are_drawn_every_thousand_steps_and_frozen_for_the_last_fifth():
    ramp = OFA.ramp(100_000, 0.9)
    assert [t for t in range(100_001) if ramp.due(t)] == list(range(0, 80_001, 1000))


def test_rewound_rate():
    table = {500: 0.5, 1000: 1.020408, 1500: 1.010204, 1999: 1.00002, 2000: 1.020408, 50_000: 1.020408,
             60_000: 0.816327, 75_000: 0.510204, 99_999: 2e-5}
    found = {t: rewound(t, 100_000, 1000, 0, 50_000, 1000) for t in table}
    assert found == pytest.approx(table, abs=1e-6)
    with pytest.raises(RecipeError, match="fill the 10"):
        rewound(0, 10, 3, 2, 9, 1)


def test_rewound_rate_before_and_within_a_later_window():
    """Straight from the definition: the decay's own clock stands still while masks change, but for the saw's teeth."""
    steps, warmup, begin, end, every = 100, 10, 30, 60, 5
    rest = steps - (end - begin)
    for t in range(steps + 5):
        clock = t if t < begin else begin + (t - begin) % every if t < end else t - (end - begin)
        slow = t / warmup if t < warmup else max(rest - clock, 0) / (rest - warmup)
        assert rewound(t, steps, warmup, begin, end, every) == pytest.approx(slow), t


@settings(deadline=None)
@given(some.integers(1, 500), some.floats(0, 1), some.floats(0, 1), some.floats(0.01, 0.3), some.floats(0, 0.99),
       some.floats(0, 0.99))
def test_a_ramp_ends_where_it_should(steps, a, b, every, initial, final):
    ramp = Cubic(begin=min(a, b), end=max(a, b), every=every, initial=initial).ramp(steps, final)
    assert ramp.due(ramp.end)
    assert ramp.at(ramp.end) == pytest.approx(final)
    assert not any(ramp.due(t) for t in range(ramp.end + 1, steps + 1))
    values = [ramp.at(t) for t in range(steps + 1)]
    assert values == sorted(values, reverse=initial > final)


def test_a_cubic_without_length_is_a_step():
    assert [cubic(t, 5, 5, 0.9) for t in (4, 5, 6)] == [0.0, pytest.approx(0.9), pytest.approx(0.9)]


def test_steps_or_shares():
    assert [Cubic(end=e).ramp(40, 0.5).end for e in (1, 1.0, 0.25, 30)] == [1, 40, 10, 30]
    kept = Cubic(begin=0, end=1, until=1.0)
    assert Cubic(**json.loads(kept.model_dump_json())).ramp(40, 0.5) == kept.ramp(40, 0.5)
    with pytest.raises(RecipeError, match="in a run of 20 steps"):
        Cubic(end=30).ramp(20, 0.5)
    with pytest.raises(ValidationError):
        Cubic(end=1.5)


def test_rounds():
    assert [1 - s for s in iterative(0.2, 10)] == pytest.approx(
        [0.8, 0.64, 0.512, 0.4096, 0.3277, 0.2621, 0.2097, 0.1678, 0.1342, 0.1074], abs=5e-5)
    keep, rounds = 0.1, 100
    assert geometric(1 - keep, rounds) == pytest.approx([1 - keep ** ((t + 1) / rounds) for t in range(rounds)])


def test_one_shot_in_rounds_scores_what_lives_anew():
    delta = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=8))
    found = prune_in_rounds(delta, 0.875, 3, "snip", batches=[batch("bert")])
    assert found.kept == 128
    assert delta.info["sparsity"][0]["rounds"] == 3
    assert len(delta.info["sparsity"]) == 1
    slow = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=8))
    names = [n for n, p in slow.tensors().items() if n.endswith((".down", ".up")) and p.dim() == 2]
    for live in (512, 256, 128):  # half of what lives goes in each round
        loss = slow.model(**batch("bert")).loss
        grads = torch.autograd.grad(loss, [slow.tensors()[n] for n in names])
        flat = torch.cat([(slow.tensors()[n] * g).abs().flatten() for n, g in zip(names, grads, strict=True)])
        keep = torch.zeros(1024, dtype=torch.bool)
        keep[flat.topk(live).indices] = True
        slow.set_masks({n: m.view_as(slow.tensors()[n]) for n, m in zip(names, keep.split(256), strict=True)})
    assert all(torch.equal(delta.masks[n], m) for n, m in slow.masks.items())
