"""The demo: one delta beside linear probe and full fine-tuning, on real reviews, from start to finish.

    python -m slimtune.bench.demo --output runs/demo

Each method is `slimtune tune` in a process of its own, so its time and peak memory are its own. Then a
new process loads the delta from its folder and must predict the same, bit for bit.
"""
import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimtune.recipe import digest_run

RECIPE = """\
model: minilm
data: {{task: classification, dataset: drugreview, max_length: {tokens}, validation_fraction: 0}}
train: {{epochs: {epochs}, batch_size: 16, learning_rate: {rate}, weight_decay: 0.01, warmup: 0.1, seed: {seed}}}
seed: {seed}
name: {name}
method: {method}
"""
TOKENS = 60


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with the training that suits it."""

    title: str
    name: str
    method: str
    rate: float
    epochs: int


ENTRIES = (
    Entry("linear probe", "linear_probe", "linear_probe", 1e-2, 4),
    Entry("IA3", "ia3", "ia3", 3e-2, 4),
    Entry("full fine-tuning", "full", "full", 1e-4, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="write the table as a picture")
    parser.add_argument("--digest", type=Path, nargs="+", help="print the digests of runs' predictions, and stop")
    options = parser.parse_args()
    if options.digest:
        print(json.dumps([digest_run(folder) for folder in options.digest]))
        return
    output = options.output / f"seed{options.seed}"
    results = [tune(entry, output, options.seed) for entry in ENTRIES]
    again = reload([output / entry.name for entry in ENTRIES])
    same = [digest == values["predictions_sha256"] for digest, values in zip(again, results, strict=True)]
    show(results, same, options.svg)
    if not all(same):
        raise SystemExit("a delta that was loaded in a new process predicts something else")


def tune(entry: Entry, output: Path, seed: int) -> dict[str, Any]:
    """Run one entry's recipe by the command line; a run that is finished already is read."""
    folder = output / entry.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = output / f"{entry.name}.yaml"
    recipe.write_text(RECIPE.format(tokens=TOKENS, epochs=entry.epochs, rate=entry.rate, seed=seed, name=entry.name,
                                    method=entry.method))
    print(f"\n--- {entry.title}: slimtune tune {recipe}", flush=True)
    command = [sys.executable, "-m", "slimtune", "tune", str(recipe), f"output={folder}"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads((folder / "result.json").read_text())


def reload(folders: list[Path]) -> list[str]:
    """Digests of the runs' test predictions in a new process, with each delta from its file."""
    command = [sys.executable, "-m", "slimtune.bench.demo", "--digest", *map(str, folders)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(results: list[dict[str, Any]], same: list[bool], svg: Path | None) -> None:
    """The table, on the terminal and as a picture."""
    table = Table(title=f"Drug reviews, 3 ratings, {results[0]['examples']['train']} train / "
                        f"{results[0]['examples']['test']} test, cut to {TOKENS} tokens")
    for name in ("method", "trainable", "% of backbone", "stored", "delta on disk", "macro-F1", "accuracy", "seconds",
                 "peak MiB", "reloads bitwise"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
    for entry, values, equal in zip(ENTRIES, results, same, strict=True):
        counts, test = values["counts"], values["metrics"]["test"]
        table.add_row(entry.title, f"{counts['trainable']:,}", f"{values['percent']:.2f}", f"{counts['stored']:,}",
                      f"{values['files']['delta'] / 1e6:.2f} MB", f"{test['macro_f1']:.3f}", f"{test['accuracy']:.3f}",
                      f"{values['seconds']['train']:.0f}", f"{values['peak_memory']:.0f}", "yes" if equal else "NO")
    console = Console(record=True, width=140)
    console.print(table)
    console.print("Trainable counts the head as well; % is adapter and norms. Peak: the whole process, training.")
    if svg is not None:
        drawn = console.export_svg(title="make demo")
        svg.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.S))  # its fonts would come from the network


if __name__ == "__main__":
    main()
