"""Attacks on a trained delta find no more than its ledger says, and do find what a run without noise gives away."""
import math
import statistics
from pathlib import Path

import pytest
import torch
from privacy_toys import texts

import slimtune as st
from slimtune.privacy import PrivacySpec, example_losses
from slimtune.testing import tiny
from slimtune.train import TrainSpec, fit

CANARIES, CLASSES, DELTA, SURE = 200, 10, 1e-5, 0.05
RUNS = {"private": PrivacySpec(epsilon=2, delta=DELTA, batch_size=50, seed=1, accountant="rdp"),
        "bare": PrivacySpec(noise_multiplier=0.0, clip=1e6, delta=DELTA, batch_size=50, seed=1)}


def attacked(folder: Path, privacy: PrivacySpec) -> tuple[float | None, list[float], list[bool]]:
    """Train on about half of the canaries, random texts with random labels; the score of each is how its loss fell."""
    canaries = texts(CANARIES, seed=5) | {
        "labels": torch.randint(0, CLASSES, (CANARIES,), generator=torch.Generator().manual_seed(7))}
    included = (torch.rand(CANARIES, generator=torch.Generator().manual_seed(6)) < 0.5).tolist()
    rows = [{key: value[i] for key, value in canaries.items()} for i in range(CANARIES) if included[i]]
    delta = st.attach(tiny("bert", num_labels=CLASSES), st.methods.Full())
    with torch.no_grad():
        before = example_losses(delta.model, canaries)

    def collate(batch):
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}

    spec = TrainSpec(steps=150, batch_size=200, learning_rate=3e-3, threads=1, save_every=1000, keep=1)
    result = fit(delta, rows, None, collate, None, spec, folder, privacy=privacy)
    delta.model.eval()
    with torch.no_grad():
        scores = before - example_losses(delta.model, canaries)
    assert result.privacy is not None
    return result.privacy["epsilon"], scores.tolist(), included


def one_run_bound(scores: list[float], included: list[bool], guesses: int) -> float:
    """Steinke et al., 2023, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846, Theorem 5.2.

    Of `guesses` guesses, the highest scores as included and the lowest as not, v are right. Of an (epsilon, delta)
    private run P[v or more] <= f(v) + 2 m delta max_i (f(v - i) - f(v)) / i, f the tail of
    Binomial(guesses, e^epsilon / (1 + e^epsilon)). The bound is the least epsilon that this does not reject.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__)
    low, high = order[:guesses // 2], order[-(guesses // 2):]
    right = sum(included[i] for i in high) + sum(not included[i] for i in low)

    def rejected(epsilon: float) -> bool:
        p = 1 / (1 + math.exp(-epsilon))
        tail = [1.0] * (guesses + 1)
        for v in range(guesses, -1, -1):
            tail[v] = math.comb(guesses, v) * p ** v * (1 - p) ** (guesses - v) + (tail[v + 1] if v < guesses else 0.0)
        extra = max(((tail[right - i] - tail[right]) / i for i in range(1, right + 1)), default=0.0)
        return tail[right] + 2 * len(scores) * DELTA * extra < SURE

    return max((e / 20 for e in range(200) if rejected(e / 20)), default=0.0)


def threshold_bound(scores: list[float], included: list[bool]) -> float:
    """Loss-threshold membership: log (TPR - delta) / FPR at the median of those left out, by Clopper and Pearson."""
    from scipy.stats import beta

    at = statistics.median(s for s, i in zip(scores, included, strict=True) if not i)
    counts = [[sum(s > at for s, i in zip(scores, included, strict=True) if i is kind), included.count(kind)]
              for kind in (True, False)]
    (hit, members), (false, others) = counts
    least = beta.ppf(SURE / 2, hit, members - hit + 1) if hit else 0.0
    most = beta.ppf(1 - SURE / 2, false + 1, others - false)
    return math.log(max((least - DELTA) / most, 1e-9))


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    return {name: attacked(tmp_path_factory.mktemp(name), spec) for name, spec in RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["one run", "threshold"])
def test_the_audit_stays_below_the_ledger_and_sees_a_run_without_noise(audits, bound):
    found = {name: one_run_bound(scores, included, 60) if bound == "one run" else threshold_bound(scores, included)
             for name, (_, scores, included) in audits.items()}
    epsilon = audits["private"][0]
    assert found["private"] <= epsilon <= 2
    assert audits["bare"][0] is None
    assert found["bare"] > found["private"]
    if bound == "one run":
        assert found["bare"] > epsilon, "the attack has the power to break a promise that is not kept"


def test_the_bound_is_the_binomials():
    """All of 60 guesses right: the tail is p^60, so that epsilon = logit of 0.05^(1/60); a coin proves nothing."""
    scores, included = [float(i) for i in range(CANARIES)], [i >= CANARIES // 2 for i in range(CANARIES)]
    p = SURE ** (1 / 60)
    assert one_run_bound(scores, included, 60) == pytest.approx(math.log(p / (1 - p)), abs=0.15)
    assert one_run_bound(scores, [i % 2 == 0 for i in range(CANARIES)], 60) == 0
