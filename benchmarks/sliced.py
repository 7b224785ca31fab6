"""How much faster is half of the multiply-adds in torch, and do dense kernels like multiples? MiniLM-L6, speed alone.

    taskset -c 1 python benchmarks/sliced.py --text ../shared/data/text/banking77/train.csv [--out FILE]

Heads and neurons go by squared gradients of their gates on 64 questions, under a budget of 50 % of their multiply-adds,
with each layer's neurons a multiple of 1, 16 and 32. Nothing is trained. The whole models are timed in turn; speedup is
the median over rounds of the dense time over this one's. float32, one thread, 32 real tokens.
"""
import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attach import machine
from torch import nn

import slimtune as st
from slimtune.compress.latency import latency
from slimtune.io.models import load_model, load_tokenizer
from slimtune.methods import get
from slimtune.sparsity.budget import Budget

TOKENS, LABELS, MULTIPLES, ROUNDS = 32, 77, (1, 16, 32), {1: 120, 8: 40, 32: 15}


def encoder() -> nn.Module:
    torch.manual_seed(0)  # the head
    return load_model("minilm", "classification", num_labels=LABELS).eval()


def half(batch: dict[str, Any], multiple: int) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder with half of the multiply-adds of its heads and neurons, and what is left of it."""
    model = encoder()
    delta = st.attach(model, get("gates")())
    st.prune(delta, 0.5, "fisher", on="gates", allocation=Budget(tokens=TOKENS, multiple=multiple), batches=[batch])
    report = st.shrink(model)
    return model.eval(), {"heads": report.heads, "neurons": report.neurons,
                          "macs": st.count_macs(model, TOKENS).total / st.count_macs(encoder(), TOKENS).total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a CSV file whose first column is a text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.text.open(newline="") as file:
        texts = [row[0] for row in csv.reader(file)][1:]
    rows = load_tokenizer("minilm")([t for t in texts if len(t.split()) >= TOKENS][:64], truncation=True,
                                    max_length=TOKENS, return_tensors="pt")
    labels = torch.arange(64) % LABELS
    models, found = {"dense": encoder()}, {"machine": machine(1), "multiples": {}, "batches": {}}
    for multiple in MULTIPLES:
        models[f"multiple {multiple}"], found["multiples"][multiple] = half({**rows, "labels": labels}, multiple)
    for size, rounds in ROUNDS.items():
        some = {key: value[:size] for key, value in rows.items()}
        with torch.no_grad():
            times = latency({name: _call(model, some) for name, model in models.items()}, rounds, batch=size)
        print(f"batch {size}\n{times}")
        found["batches"][size] = times.as_dict()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _call(model: nn.Module, batch: dict[str, Any]) -> Callable[[], object]:
    return lambda: model(**batch)


if __name__ == "__main__":
    main()
