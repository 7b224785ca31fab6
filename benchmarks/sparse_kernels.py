"""Do sparse kernels make a pruned model faster? MiniLM-L6 in torch, dense and sparse, in turn.

    taskset -c 1 python benchmarks/sparse_kernels.py [--quick] [--out benchmarks/results/sparse_kernels.json]
    python benchmarks/sparse_kernels.py --table benchmarks/results/sparse_kernels.json   # its part of docs/sparsity.md

The linear maps of the blocks are pruned by magnitude, one threshold for all; `sparsify` measures each map on batches of
the size in question and lets it run sparse where that gains a tenth. Then the whole model is timed against its dense
self, the same weights with their zeros in place. gain is dense time over sparse time of pairs taken in turn, now the
one first, now the other: the median, with the 10th and 90th percentile. wall is of the clock, cpu of the process alone,
which other work on the core disturbs less. float32, one thread.
"""
import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from attach import machine, spread
from torch import nn

import slimtune as st
from slimtune.bench.page import renewed
from slimtune.compress import Sparsified, sparsify
from slimtune.io.models import load_model
from slimtune.recipe.folder import write_text

PAGE, MARKS = Path("docs/sparsity.md"), ("<!-- sparse kernels -->", "<!-- end of sparse kernels -->")
MODEL, TOKENS, LEVELS, ROUNDS = "minilm", 64, (0.8, 0.9, 0.95, 0.99), {1: 31, 8: 11, 32: 7}


def pruned(level: float) -> tuple[nn.Module, int]:
    """The encoder in eval mode with that share of the blocks' weights at 0, and how many are not."""
    model = load_model(MODEL, "classification", num_labels=2)
    done = st.prune(st.attach(model, st.methods.Full()), level, "magnitude", on="base")
    return model.eval(), done.kept


def gains(dense: Callable[[], object], sparse: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Dense time over sparse time."""
    found: dict[str, list[float]] = {"wall": [], "cpu": []}
    times = []
    for turn in range(-1, rounds):  # the first warms up
        took = {}
        for name, run in (("dense", dense), ("sparse", sparse))[::1 if turn % 2 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            took[name] = time.perf_counter() - wall, time.process_time() - cpu
        if turn >= 0:
            times.append(took["dense"][1])
            for i, clock in enumerate(found):
                found[clock].append(took["dense"][i] / took["sparse"][i])
    return {"dense_cpu_ms": round(1e3 * sorted(times)[rounds // 2], 2), **{k: spread(v) for k, v in found.items()}}


def ran(report: Sparsified) -> dict[str, Any]:
    """Which layers run sparse, by kind of map and form, and what their own measurement said."""
    kinds = Counter((layer.path.partition("layer.")[2].partition(".")[2] or layer.path, layer.form)
                    for layer in report.layers)
    return {"sparse": len(report.switched), "of": len(report.layers),
            "forms": dict(Counter(layer.form for layer in report.layers)),
            "by_kind": {f"{kind} {form}": number for (kind, form), number in sorted(kinds.items())},
            "layers": {layer.path: {"form": layer.form, "density": round(layer.density, 4),
                                    "gain": {form: round(gain, 2) for form, gain in layer.speedup.items()}}
                       for layer in report.layers}}


def one(level: float, batch: int, rounds: int) -> dict[str, Any]:
    """One row: a level of sparsity at a batch size."""
    dense, kept = pruned(level)
    sparse = deepcopy(dense)
    report = sparsify(sparse, tokens=TOKENS, batch=batch)
    ids = torch.randint(1000, 20_000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        told, now = dense(input_ids=ids).logits, sparse(input_ids=ids).logits
        found = gains(lambda: dense(input_ids=ids), lambda: sparse(input_ids=ids), rounds)
    return {"sparsity": level, "batch": batch, "kept": kept, **found, **ran(report),
            "difference": float((told - now).abs().max() / told.abs().max())}


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, by batch: how many maps run sparse, and the gain by the clock of the process."""
    on, rows = result["machine"], {(row["sparsity"], row["batch"]): row for row in result["rows"]}
    levels, sizes = (sorted(set(keys)) for keys in zip(*rows, strict=True))
    lines = ["| weights at 0 | " + " | ".join(f"batch {size}" for size in sizes) + " |",
             "|---" * (len(sizes) + 1) + "|"]
    for level in levels:
        found = [(rows[level, size]["cpu"], rows[level, size]["sparse"]) for size in sizes]
        cells = [f"{g['median']:.2f}x ({g['p10']:.2f} to {g['p90']:.2f}), {maps} maps" for g, maps in found]
        lines.append(f"| {level:.0%} | " + " | ".join(cells) + " |")
    worst = max(row["difference"] for row in rows.values())
    return "\n".join([*lines, "", f"{result['tokens']} tokens a text, {on['threads']} thread of {on['cpu']}, torch "
                      f"{on['torch']}, with other work on the core (a load of {on['load_average'][0]:.0f}); outputs "
                      f"are the same to {worst:.0e} of the largest."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one level, few pairs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="only write the table of these results into the page")
    options = parser.parse_args()
    if options.table:
        write_text(PAGE, renewed(PAGE.read_text(), MARKS, table(json.loads(options.table.read_text()))))
        return
    torch.set_num_threads(1)
    rows = []
    for level in LEVELS[-1:] if options.quick else LEVELS:
        for batch, rounds in ROUNDS.items():
            rows.append(one(level, batch, 3 if options.quick else rounds))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "layers"}), flush=True)
    if options.out:
        result = {"machine": machine(1), "model": MODEL, "tokens": TOKENS, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
