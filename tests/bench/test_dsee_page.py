"""The DSEE benchmark: an arm end to end on a tiny encoder, what a mask saves by hand, and the page by its figures."""
import pytest
import torch

from slimtune.bench import dsee
from slimtune.bench.dsee_page import page
from slimtune.core import attach
from slimtune.methods import DSEE, Full, Gates
from slimtune.sparsity.dsee import dsee_structured, dsee_unstructured
from slimtune.sparsity.prune import prune
from slimtune.testing.tiny import batch, tiny

OWN = {"support": "magnitude", "rank": 2, "nonzero": 16}


def cell(seed: int, accuracy: float, executed: int = 100, theoretical: int = 100, trained: int = 10) -> dict:
    return {"seed": seed, "accuracy": accuracy, "trained": trained, "bytes": {"delta": 2_250_000, "model": 90_000_000},
            "dense_macs": 100, "executed_macs": executed, "theoretical_macs": theoretical}


def found() -> dict:
    rows = {"full fine-tuning": (0.90, 0.88), "LoRA": (0.86, 0.86), "DSEE": (0.87, 0.88), "DSEE, S1 50%": (0.85, 0.85)}
    sizes = {"DSEE, S1 50%": {"theoretical": 53}}
    cells = {f"{title}/{seed}": cell(seed, value, **sizes.get(title, {}))
             for title, values in rows.items() for seed, value in enumerate(values)}
    return {"setting": dsee.setting(), "validation": {"LoRA, rates 0.001 and 0.003": 0.877},
            "chosen": {"rates": [1e-3, 3e-3], "l1": 1e-5}, "cells": cells}


def test_a_row_has_the_first_figures_and_gains_seed_by_seed():
    text = page(found())
    assert "| DSEE, S1 50% | 10 | 2.25 | 90.0 | 100 (100.0%) | 53 (53.0%) | 85.0 ± 0.0 | -4.0 ± 1.4 |" in text
    assert "| full fine-tuning | 10 | 2.25 | 90.0 | 100 (100.0%) | 100 (100.0%) | 89.0 ± 1.4 |  |" in text
    assert "over 2 seeds;" in text
    assert "Does S2 add to LoRA of equal rank? +1.5 ± 0.7." in text
    assert "magnitude pruning?" not in text  # its row is not there
    assert "- LoRA, rates 0.001 and 0.003: 87.7" in text


def test_one_seed_has_no_spread():
    whole = found()
    whole["cells"] = {key: c for key, c in whole["cells"].items() if c["seed"] == 0}
    text = page(whole)
    assert "over one seed, which tells no small difference;" in text
    assert "| 86.0 | -4.0 |" in text


@pytest.mark.parametrize(("methods", "cut", "gone", "beside"), [
    ([DSEE(**OWN)], lambda d: dsee_unstructured(d, 0.5), 8192, 4 * (2 * 64 + 16)),
    ([Full()], lambda d: prune(d, 0.5, "magnitude", on="base"), 8192, 0),
    ([DSEE(**OWN), Gates()], lambda d: dsee_structured(d, 1, 0.25), 0, 0), ([DSEE(**OWN)], lambda d: None, 0, 0)])
def test_what_skipping_zeros_saves_is_the_masked_weights_less_the_update(methods, cut, gone: int, beside: int):
    model = tiny("bert")
    delta = attach(model, methods)
    total = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer." in n)
    cut(delta)
    assert not gone or gone == total // 2
    assert dsee._skipped(delta) == gone - beside


def test_the_arms_are_those_of_the_page_and_fold_into_the_model(monkeypatch, tmp_path):
    """Each arm, two steps a stage, on a tiny encoder in place of MiniLM: what is deployed is what was trained."""
    rows = [{key: value[i] for key, value in batch("bert").items()} for i in range(2)] * 4
    collate = lambda some: {key: torch.stack([row[key] for row in some]) for key in some[0]}  # noqa: E731
    data = type("Data", (), {"train": rows, "collate": staticmethod(collate), "label_names": ("0", "1")})
    monkeypatch.setattr(dsee, "load_model", lambda *_, **__: tiny("bert"))
    monkeypatch.setattr(dsee, "STAGE", dsee.STAGE.model_copy(update={"steps": 2, "batch_size": 4}))
    monkeypatch.setattr(dsee, "HEADS", 1)
    monkeypatch.setattr(dsee, "RANK", 2)
    wide = dsee.get
    monkeypatch.setattr(dsee, "get", lambda name: (lambda **v: wide(name)(**v, **(
        {"support": "magnitude"} if name == "dsee" else {}))))
    done = {arm.title: dsee.learn(arm, data, 0, rows) for arm in dsee.arms((1e-3, 3e-3), 1e-5)}
    assert all(c["folding_changed"] < 1e-5 for c in done.values())
    assert done["DSEE, S1 50%"]["sparsity"]["sparsity"] == 0.5
    assert done["full, magnitude 50%"]["theoretical_macs"] < done["full, magnitude 50%"]["executed_macs"]
    small = done["DSEE, 3 heads and 25% neurons"]
    assert small["executed_macs"] == small["theoretical_macs"] == 0.75 * small["dense_macs"]
    assert small["bytes"]["model"] < done["DSEE"]["bytes"]["model"]
    assert done["DSEE"]["trained"] == done["LoRA"]["trained"] + 4 * dsee.ENTRIES
    text = page({"setting": dsee.setting(), "validation": {}, "chosen": {"rates": [1e-3, 3e-3], "l1": 1e-5},
                 "cells": {f"{title}/0": {"seed": 0, **c} for title, c in done.items()}})
    assert all(f"| {title} |" in text for title in done)
    assert text.count("? +0.0") + text.count("? -") + text.count("? +") >= 5


def test_the_best_on_validation_phrases_is_taken_and_what_was_tried_is_not_tried_again(monkeypatch, tmp_path):
    scores = {(1e-3, 3e-3): 0.8, (3e-3, 1e-2): 0.85}
    asked = []

    def learn(arm, data, seed, judged):
        asked.append((arm.title, arm.rates, seed, len(judged)))
        l1 = getattr(arm.parts[-1], "l1", None)
        return {"accuracy": scores[arm.rates] if l1 is None else 1 - l1, "train_loss": 0, "cpu_seconds": 0}

    monkeypatch.setattr(dsee, "learn", learn)
    data = type("Data", (), {"validation": list(range(3000))})
    kept = {"validation": {}, "cells": {}}
    made = dsee.choose(data, kept, tmp_path / "dsee.json")
    assert kept["chosen"] == {"rates": [3e-3, 1e-2], "l1": 1e-5}
    assert {arm.rates for arm in made[2:]} == {(3e-3, 1e-2)}
    assert {arm.rates for arm in made[:2]} == {dsee.FULL}
    assert len(asked) == 4
    assert {one[2:] for one in asked} == {(dsee.CHOSEN_ON, dsee.PHRASES)}
    dsee.choose(data, kept, tmp_path / "dsee.json")
    assert len(asked) == 4
