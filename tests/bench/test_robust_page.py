"""The page of the robust tickets says what the figures say, and settings that make other models have another folder."""
import json
from dataclasses import replace

from slimtune.bench.robust_page import LONGER, page
from slimtune.bench.robust_settings import SETTINGS


def row(clean: float, words: float, ball: float) -> dict:
    def told(under: float) -> dict:
        return {"clean": clean, "under_attack": under, "success": (clean - under) / clean, "queries": 20.0,
                "examples": 100, "changed": 0.1}
    return {"words": told(words), "pgd 0.1": told(ball), "kept": {"bert.encoder.layer.0.x.weight": 0.7}}


def test_the_page_tells_what_holds():
    found = {"settings": json.loads(json.dumps(SETTINGS.told())), "facts": {"phrases": 9600, "embedding_norm": 1.234},
             "seeds": {
        "0": {"dense": row(0.9, 0.4, 0.3), "magnitude": row(0.88, 0.5, 0.2), "robust": row(0.86, 0.6, 0.25)},
        "1": {"dense": row(0.9, 0.5, 0.3), "magnitude": row(0.88, 0.5, 0.2), "robust": row(0.86, 0.6, 0.25)}}}
    text = page(found)
    assert "- Words: holds; +15.0 points beside dense, +10.0 beside magnitude." in text
    assert "- PGD 0.1: does not hold; -5.0 points beside dense, +5.0 beside magnitude." in text
    assert "- Clean: does not hold; -4.0 points beside dense." in text
    assert "| dense | 90.0 (90.0 to 90.0) | 45.0 (40.0 to 50.0) | 50.0 (44.4 to 55.6) | 20.0 (20.0 to 20.0) |" in text
    assert "500 steps of 32 phrases, 1.67 of an epoch" in text
    assert "norm 1.23 on average" in text
    assert "standard error of up to 5.0 points" in text
    assert "Control" not in text


def test_a_control_is_told_where_it_was_run():
    one = {"dense": row(0.9, 0.4, 0.3), "magnitude": row(0.88, 0.5, 0.2), "robust": row(0.86, 0.6, 0.25)}
    found = {"settings": json.loads(json.dumps(SETTINGS.told())), "facts": {"phrases": 9600, "embedding_norm": 1.0},
             "seeds": {"0": one | {LONGER: row(0.8, 0.3, 0.3)}, "1": one}}
    text = page(found)
    control = "Control, 1 of 2 seeds, beside dense for as many steps as search and ticket"
    assert f"- {control}: Words +30.0, PGD 0.1 -5.0, clean +6.0." in text
    assert "| dense, 800 steps | 80.0 |" in text


def test_a_folder_of_models_is_that_of_what_makes_them():
    assert replace(SETTINGS, sentences=3).digest() == SETTINGS.digest()
    assert replace(SETTINGS, sparsity=0.7).digest() != SETTINGS.digest()
