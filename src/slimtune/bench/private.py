"""Private training on real data with a real encoder: epsilon 8, 3 and 1 beside none, three seeds.

    python -m slimtune.bench.private                    # every cell that is not done, and the table in docs/privacy.md
    python -m slimtune.bench.private --minutes 10       # as many as fit, seed by seed; run it again to go on
    python -m slimtune.bench.private --page             # the table alone

A cell is a run of recipes/private-sst2.yaml with another epsilon; without privacy it takes the same steps with the
same draws, neither clipped nor noised. SST-2 is read from --data FOLDER, else SLIMTUNE_SST2, else as the recipe says.
"""
import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from slimtune.bench.private_page import page
from slimtune.bench.results import record, recorded
from slimtune.recipe import Recipe, read_recipe, run
from slimtune.recipe.folder import write_text

RECIPE = Path("recipes/private-sst2.yaml")
OUT, DOC = Path("benchmarks/results/private_learning.json"), Path("docs/privacy.md")
LEVELS: dict[str, list[str]] = {
    "none": ["privacy.epsilon=null", "privacy.noise_multiplier=0", "privacy.clip=1e6"],
    "8": ["privacy.epsilon=8"], "3": ["privacy.epsilon=3"], "1": ["privacy.epsilon=1"]}
SEEDS = (0, 1, 2)


def recipe_of(level: str, seed: int, data: str | None = None, more: Iterable[str] = ()) -> Recipe:
    """The recipe of a cell. The seed draws head, examples, dropout and noise: so a cell can be repeated."""
    files = [f"data.{split}={data}/{split}.tsv" for split in ("train", "test")] if data else []
    seeds = [f"seed={seed}", f"train.seed={seed}", f"privacy.seed={seed}", "train.threads=1"]
    return read_recipe(RECIPE, [*LEVELS[level], *seeds, *files, *more])


def learn(level: str, seed: int, data: str | None = None, more: Iterable[str] = ()) -> dict[str, Any]:
    """Train by the recipe and score the last step on test."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = run(recipe_of(level, seed, data, [*more, f"output={folder}/run"])).values
        history = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    told, test = found["privacy"], found["metrics"]["test"]
    return {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"], "epsilon": told["epsilon"],
            "sigma": told["noise_multiplier"], "clip": told["clip"], "delta": told["delta"],
            "train_loss": [line["loss"] for line in history if "loss" in line][-1],
            "counts": found["counts"], "examples": found["examples"], "steps": found["steps"],
            "cpu_seconds": round(time.process_time() - begin, 1)}


def budget() -> dict[str, Any]:
    """What the cells are runs of, as the results hold it."""
    kept = ("model", "method", "privacy", "train")
    fixed = read_recipe(RECIPE).resolved()
    return {"levels": LEVELS, "max_length": fixed["data"]["max_length"], **{key: fixed[key] for key in kept}}


def main() -> None:
    """Run, keep each cell as it comes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, help="begin no cell after this time")
    parser.add_argument("--data", default=os.environ.get("SLIMTUNE_SST2"), help="folder of train.tsv and test.tsv")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--page", action="store_true", help="only write the table again")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    found = recorded(options.out, "budget", budget(), cells={})
    for seed, level in () if options.page else product(options.seeds, options.levels):
        key = f"{level}/{seed}"
        if key in found["cells"]:
            continue
        if time.monotonic() > until:
            print("the time is up; run it again to go on", flush=True)
            break
        found["cells"][key] = learn(level, seed, options.data)
        print(key, found["cells"][key], flush=True)
        record(options.out, found)
    if found["cells"]:
        write_text(options.doc, page(found, options.doc.read_text() if options.doc.is_file() else ""))


if __name__ == "__main__":
    main()
