"""The ledger against the figures of arXiv 2110.06500's runs, its promise, and its memory."""
import importlib
import sys

import pytest
from privacy_toys import ledger

from slimtune.errors import DeltaError, ExtraError, RecipeError, SlimtuneError, TrainError
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.spec import PrivacySpec

RUNS = {"mnli": (392_702, 1e-6, 0.7311, 7.252, 6.595), "qqp": (363_849, 1e-6, 0.7417, 7.257, 6.609),
        "qnli": (104_743, 1e-5, 0.9639, 7.228, 6.613), "sst2": (67_349, 1e-5, 1.1011, 7.236, 6.636)}
"""Examples, delta, sigma of 50 epochs at batches of 2000, and epsilon by RDP and by PRV (its estimate)."""


@pytest.mark.parametrize("task", RUNS)
def test_epsilon_of_the_papers_runs(task):
    examples, delta, sigma, rdp, prv = RUNS[task]
    steps = 50 * (examples // 2000)
    books = [Ledger(PrivacySpec(delta=delta, noise_multiplier=sigma, accountant=name), examples, 2000, steps)
             for name in ("rdp", "prv")]
    assert books[0].of(steps) == pytest.approx(rdp, abs=1e-2)
    assert books[1].of(steps) == pytest.approx(prv + 0.01, abs=1e-2)    # an upper bound, at its error of 0.01
    assert books[1].accountant is not None
    books[1].accountant.history = [(sigma, books[1].rate, steps)]
    assert books[1].accountant.get_epsilon(delta=delta, eps_error=0.1) == pytest.approx(prv + 0.1, abs=1e-2)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_noise_keeps_the_promise_and_is_not_much_more(accountant):
    book = Ledger(PrivacySpec(epsilon=2, delta=1e-4, accountant=accountant), 1000, 20, 50)
    assert 1.98 <= book.of(50) <= 2
    assert book.sigma > Ledger(PrivacySpec(epsilon=4, delta=1e-4, accountant="rdp"), 1000, 20, 50).sigma
    for _ in range(50):
        book.charge()
    assert book.spent() == book.of(50)
    with pytest.raises(TrainError, match="50 steps were planned"):
        book.charge()
    assert book.steps == 50


def test_a_delta_that_is_too_large_is_told(caplog):
    Ledger(PrivacySpec(noise_multiplier=1.0, delta=1e-3), 1000, 20, 50)
    assert "privacy.delta: 0.001 is not below 1 / examples" in caplog.text


def test_an_early_end_spends_less():
    book = ledger(1.0)
    found = []
    for _ in range(3):
        book.charge()
        found.append(book.spent())
    assert 0 < found[0] < found[1] < found[2] < book.of(1000)
    assert book.report()["epsilon"] == found[2]
    assert book.report()["steps"] == 3


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(RecipeError, match="spends epsilon") as caught:
        Ledger(PrivacySpec(epsilon=1, noise_multiplier=0.5, delta=1e-5, accountant="rdp"), 1000, 20, 50)
    sigma = float(str(caught.value).split("It takes ")[1].split(";")[0])
    assert Ledger(PrivacySpec(epsilon=1, noise_multiplier=sigma + 1e-4, delta=1e-5, accountant="rdp"), 1000, 20, 50)
    with pytest.raises(RecipeError, match=r"privacy.batch_size: 1001 examples"):
        Ledger(PrivacySpec(epsilon=1, delta=1e-5), 1000, 1001, 50)
    with pytest.raises(RecipeError, match=r"privacy.epsilon: no noise keeps"):
        Ledger(PrivacySpec(epsilon=1e-7, delta=1e-9, accountant="rdp"), 1000, 1000, 10**6)


def test_without_noise_nothing_is_promised():
    book = ledger(0.0)
    book.charge()
    assert book.spent() == float("inf")
    assert book.report()["epsilon"] is None


def test_its_state_goes_on_and_refuses_another_runs():
    book, again = ledger(1.0), ledger(1.0)
    for _ in range(7):
        book.charge()
    again.load(book.state(), 7)
    assert again.spent() == book.spent()
    for other, step in ((ledger(1.0), 6), (ledger(2.0), 7), (ledger(1.0, accountant="prv"), 7)):
        with pytest.raises(DeltaError, match="the checkpoint's ledger"):
            other.load(book.state(), step)


def test_without_opacus_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ExtraError, match=r"slimtune\[privacy\]"):
        ledger(1.0)


def test_an_opacus_that_cannot_be_loaded_says_why(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.delitem(sys.modules, "opacus.accountants", raising=False)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(SlimtuneError, match="cannot be loaded: No module named 'scipy'") as found:
        ledger(1.0)
    assert isinstance(found.value.__cause__, ModuleNotFoundError)


def test_the_spec_says_what_is_missing_or_idle():
    with pytest.raises(ValueError, match="give epsilon"):
        PrivacySpec(delta=1e-5)
    with pytest.raises(ValueError, match="quantile is for clipping=adaptive"):
        PrivacySpec(epsilon=1, delta=1e-5, quantile=0.4)
