"""Time and memory of a private step, beside the plain step of the same method on the same batches.

    python benchmarks/privacy.py [--quick] [--threads 1] [--rounds 10] [--out benchmarks/results/privacy.json]

BERT-base at random values, batch 8, 128 tokens, no dropout. A step is forward, backward and AdamW; a private one also
takes each example's gradient, clips, and adds noise. In each round both take a step in turn, so that a ratio is of
steps taken within seconds of each other; given are medians of those ratios, with the spread from the 10th to the 90th
percentile. `gradients` is what the examples' gradients take, in MB.
"""
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import slimtune as st
from slimtune.privacy import Ledger, PrivacySpec, PrivateStep
from slimtune.privacy.draws import new_secret
from slimtune.train.state import adamw

BATCH, TOKENS = 8, 128
METHODS = {"lora": st.methods.LoRA(rank=16), "ia3": st.methods.IA3(), "pfeiffer": st.methods.Pfeiffer(),
           "prefix": st.methods.PrefixTuning(length=16), "bitfit": st.methods.BitFit()}


def bert(quick: bool) -> nn.Module:
    layers, width = (2, 64) if quick else (12, 768)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=max(2, width // 64), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def steps_of(method: Any, quick: bool) -> tuple[dict[str, Callable[[], object]], int]:
    """The plain and the private step on one model, and the numbers trained."""
    delta = st.attach(bert(quick), method)
    delta.model.train()
    draw = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(5, 30_000, (BATCH, TOKENS), generator=draw),
             "labels": torch.randint(0, 2, (BATCH,), generator=draw)}
    plain, noisy = adamw(delta, lr=1e-3), adamw(delta, lr=1e-3)
    ledger = Ledger(PrivacySpec(noise_multiplier=1.0, delta=1e-5), 10_000, BATCH, 1_000_000)
    private, number = PrivateStep(delta, noisy, ledger, new_secret(0)), iter(range(1, 1_000_000))

    def usual() -> None:
        plain.zero_grad()
        delta.model(**batch).loss.backward()
        plain.step()

    def dp() -> None:
        private.begin()
        private.add(batch)
        private.finish(next(number))
        noisy.step()

    return {"plain": usual, "private": dp}, sum(p.numel() for p in delta.parameters())


def measure(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    steps, numbers = steps_of(METHODS[name], quick)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for i in range(rounds + 1):
        for key, step in steps.items():
            begin = time.perf_counter()
            step()
            if i:
                times[key].append(time.perf_counter() - begin)
    ratios = sorted(b / a for a, b in zip(times["plain"], times["private"], strict=True))
    return {"trained": numbers, "seconds": {key: statistics.median(found) for key, found in times.items()},
            "ratio": statistics.median(ratios), "spread": [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]],
            "gradients_mb": BATCH * numbers * 4 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: only shows that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                             "threads": options.threads, "torch": torch.__version__, "quick": options.quick,
                             "batch": BATCH, "tokens": TOKENS, "methods": {}}
    for name in METHODS:
        one = found["methods"][name] = measure(name, options.quick, options.rounds)
        print(f"{name:10} {one['trained']:>10,} numbers  plain {one['seconds']['plain']:.3f} s  private "
              f"{one['ratio']:.2f} times ({one['spread'][0]:.2f} to {one['spread'][1]:.2f})  gradients "
              f"{one['gradients_mb']:.1f} MB")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
