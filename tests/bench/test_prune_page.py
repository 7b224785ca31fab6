"""The pages of the two pruning benchmarks say what their figures say."""
import importlib.util

import pytest

from slimtune.bench.prune_page import page, picture, points
from slimtune.bench.sparse_adapter import ARMS, budget
from slimtune.bench.sparse_adapter_page import page as adapters


def arm(how: str, accuracy: float, macs: int) -> dict:
    return {"how": how, "level": 0.5, "accuracy": accuracy, "macs": macs, "parameters": macs // 10,
            "bytes": {"model": 4 * macs}, "before_training": None if how == "dense" else 0.3, "label_loyalty": 0.9,
            "probability_loyalty": 0.8}


def found() -> dict:
    spread = {"p50": 2.0, "p10": 1.5, "p90": 3.0}
    names = ("dense torch", "fisher-50 torch", "fisher-50 onnxruntime int8")
    run = {"wall": dict.fromkeys(names, spread), "speedup": dict(zip(names, (1.0, 1.9, 7.25), strict=True)),
           "rounds": 40, "setting": {"instruction_sets": ["avx512", "vnni"]}}
    return {"setting": {"tokens": 32, "scored": 512, "dense": {"epochs": 4}, "again": {"epochs": 2},
                        "teach": {"weight": 0.9, "temperature": 2.0}},
            "arms": {"dense": arm("dense", 0.9, 1_000_000), "fisher-50": arm("fisher", 0.89, 500_000)},
            "int8": {"fisher-50": {"accuracy": 0.885, "bytes": {"int8.onnx": 2_000_000}}}, "latency": {"1": run}}


def test_the_page_of_smaller_models():
    text, _ = page(found() | {"latency": {}})
    assert "| fisher-50 | 50,000 | 500,000 (50%) | 2.0 MB | 2.0 MB | 30.0 | 89.0 | 0.900 | 0.800 | 88.5 |" in text
    assert "prune.svg" not in text
    assert points(found(), "1")[-1] == ("fisher", "fisher-50 onnxruntime int8", 7.25, 88.5)


def test_its_picture():
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs the extra `bench`")
    drawn = picture(found())
    assert drawn.startswith("<?xml")
    assert "batch 1" in drawn
    text, _ = page(found(), "other.svg")
    assert "| fisher-50 onnxruntime int8 | 2.00 (1.50 to 3.00) | 7.25 |" in text
    assert "(other.svg)\n\nThe dashed line is 1 point below the dense model's accuracy" in text


def test_the_page_of_sparse_adapters():
    cells = {}
    for seed, gains in ((0, (0.0, 0.02, 0.01)), (1, (0.0, 0.02, 0.03))):
        for title, gain in zip(("1x dense", "1x snip 40%", "2x snip 50%"), gains, strict=True):
            one = next(a for a in ARMS if a.title == title)
            cells[f"{title}/{seed}"] = {"criterion": one.criterion, "sparsity": one.sparsity, "times": one.times,
                                        "allocation": one.allocation, "seed": seed, "accuracy": 0.8 + gain, "kept": 10,
                                        "trainable": 20}
    text = adapters({"budget": budget(), "cells": cells})
    assert "| 1x snip 40% | 10 | 20 | 82.0 ± 0.0 | +2.0 ± 0.0 |" in text
    assert "What the paper claims" not in text          # not before the last row is there
    last = next(a for a in ARMS if a.title == "4x snip 75%")
    cells["4x snip 75%/0"] = cells["1x snip 40%/0"] | {"times": 4, "sparsity": last.sparsity}
    told = adapters({"budget": budget(), "cells": cells})
    assert "SNIP at 40 % is at least as good as dense: +2.0 ± 0.0 points: holds." in told
