"""Bytes on disk of one backbone and 50 tasks' deltas, against 50 full copies of the model.

    python benchmarks/storage.py [--quick] [--tasks 50] [--folder DIR] [--out benchmarks/results/storage.json]

The backbone is the packaged DINOv2-S (`dinov2-s-saliency`) as it lies on disk; a task is a delta and its head of 10
classes, with values of its own, saved as `Delta.save` saves it. One full copy, the model with a head as transformers
saves it, is written and measured, and counted as often as there are tasks. The last delta of each method is loaded
into a fresh model and must give the same logits, bit for bit. size: bytes of the files (st_size); disk: bytes that the
file system gives them and their folders (512 st_blocks). All are float32.
"""
import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attach import machine

import slimtune as st
from slimtune.io.models import find_model, load_model
from slimtune.testing import randomize

MODEL, CLASSES = "dinov2-s-saliency", 10
M: Any = st.methods
METHODS: dict[str, st.Method] = {
    "linear": M.LinearProbe(), "bias": M.BitFit(), "FacT-TT, rank 16": M.FacT(form="tt", rank=16),
    "adapter, width 8": M.Pfeiffer(bottleneck=8), "LoRA, rank 8, q and v": M.LoRA(rank=8, alpha=16),
    "VPT-deep, 50 tokens": M.VPT(length=50)}


def measured(folder: Path) -> dict[str, int]:
    """Bytes of all files below a folder, and what the file system gives to them and to the folders."""
    found = [folder, *folder.rglob("*")]
    os.sync()  # blocks are given when data is written out
    stats = [p.stat() for p in found]
    return {"size": sum(s.st_size for p, s in zip(found, stats, strict=True) if p.is_file()),
            "disk": 512 * sum(s.st_blocks for s in stats)}


def fresh() -> Any:
    return load_model(MODEL, "image_classification", num_labels=CLASSES)


def tasks(method: st.Method, count: int, home: Path) -> tuple[st.Count, dict[str, int]]:
    """Save as many deltas, each with values of its own; the bytes of them all."""
    pixels = {"pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))}
    model = fresh()
    delta = st.attach(model, method)
    for task in range(count):
        randomize(delta, seed=task)
        delta.save(home / f"task-{task}")
    with torch.no_grad():
        wanted, again = model(**pixels).logits, fresh()
        st.load(again, home / f"task-{count - 1}")
        if not torch.equal(again(**pixels).logits, wanted):
            raise SystemExit(f"{method!r}: what was loaded gives other logits.")
    return delta.count(), measured(home)


def rows(count: int, home: Path) -> Iterator[dict[str, Any]]:
    """The figures of each method, which are printed as they come."""
    backbone = measured(Path(find_model(MODEL)))
    fresh().save_pretrained(home / "copy")
    copy = measured(home / "copy")
    yield {"backbone": backbone, "full_copy": copy, "full_copies": {key: count * n for key, n in copy.items()}}
    for name, method in METHODS.items():
        counted, own = tasks(method, count, home / name.partition(",")[0])
        total = {key: backbone[key] + own[key] for key in own}
        yield {"method": name, "trained": counted.trainable, "head": counted.head, "deltas": own,
               "backbone_and_deltas": total,
               "a_delta": {key: round(n / count) for key, n in own.items()},
               "of_full_copies": {key: round(total[key] / (count * copy[key]), 5) for key in own},
               "times_smaller": {key: round(count * copy[key] / total[key], 2) for key in own}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three tasks: whether it runs")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where to write, which tells the file system; by default /tmp")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = 3 if options.quick else options.tasks
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        found = []
        for row in rows(count, Path(home)):
            print(json.dumps(row), flush=True)
            found.append(row)
        block = os.statvfs(home).f_bsize
    result = {"machine": machine(torch.get_num_threads()) | {"block": block}, "model": MODEL, "tasks": count,
              "classes": CLASSES, "unit": "bytes", **found[0], "methods": found[1:]}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
