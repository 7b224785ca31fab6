"""Step time with the feature cache, beside the same method's own step, a LoRA step and a full fine-tuning step.

    python benchmarks/features.py [--quick] [--threads 1] [--out benchmarks/results/features.json]

BERT-base and T5-base at random values, batch 8, 128 tokens (and 32 of target), no dropout. All deltas are on one
model in one process. A step is forward, backward and AdamW; in each round every one takes a step in turn, so that a
ratio is of steps taken within seconds of each other. Given are medians, ratios with the spread from the 10th to the
90th percentile, the time to fill the cache, and its size.
"""
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import slimtune as st
from slimtune.train import TrainSpec
from slimtune.train.features import Features, numbered
from slimtune.train.fill import open_features
from slimtune.train.signals import Signals
from slimtune.train.state import adamw

BATCH, TOKENS, TARGET, BATCHES = 8, 128, 32, 3
Row = dict[str, list[int]]
GOALS = {"lst": {"own": 0.20, "lora": 0.12, "full": 0.08}}


def bert(quick: bool) -> nn.Module:
    layers, width = (2, 64) if quick else (12, 768)
    size = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width,
            "num_attention_heads": max(2, width // 64)}
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def t5(quick: bool) -> nn.Module:
    layers, width = (2, 64) if quick else (12, 768)
    size = {"num_layers": layers, "d_model": width, "d_ff": 4 * width, "num_heads": max(2, width // 64)}
    config = transformers.T5Config(dropout_rate=0.0, decoder_start_token_id=0, **size)
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config)


def rows(pairs: bool) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(5, 30_000, (n,), generator=draw).tolist()  # noqa: E731
    return [{"input_ids": ids(TOKENS), "labels": ids(TARGET) if pairs else [i % 2]} for i in range(BATCH * BATCHES)]


def collate(batch: Any) -> dict[str, Tensor]:
    made = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}
    return {**made, "labels": made["labels"].squeeze(1) if made["labels"].shape[1] == 1 else made["labels"]}


def methods(pairs: bool) -> dict[str, st.Method]:
    """Those that can be cached. T5 has no head to probe; its encoder stays frozen under partial-k of the decoder."""
    lst = st.methods.LST(reduction=8, dropout=0.0)
    if pairs:
        return {"lst": lst, "partial_k": st.methods.PartialK(towers=("decoder",))}
    return {"lst": lst, "linear_probe": st.methods.LinearProbe(), "partial_k": st.methods.PartialK()}


def stepper(delta: Any, data: list[Row], features: Features | None) -> Callable[[], float]:
    """One training step on the next batch, in seconds; the batch is made beforehand."""
    optimizer, turn = adamw(delta, lr=1e-5), iter(range(10**9))

    def step() -> float:
        start = next(turn) * BATCH % len(data)
        batch = numbered(collate)([(i, data[i]) for i in range(start, start + BATCH)])
        delta.activate()
        delta.model.train()
        begun = time.perf_counter()
        if features is not None:
            with features(batch):
                delta.model(**batch).loss.backward()
        else:
            batch.pop("slimtune_index")
            delta.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    step()
    return step


def filled(delta: Any, data: list[Row], folder: Path) -> tuple[Features, dict[str, Any]]:
    delta.activate()
    told: list[tuple[float, int]] = []
    features = open_features(delta, data, collate, TrainSpec(cache=str(folder), batch_size=BATCH), folder, Signals(),
                             lambda event: told.append((time.perf_counter(), event["step"])))
    seconds = (told[-1][0] - told[0][0]) / (told[-1][1] - told[0][1])  # after the first batch
    size = sum(path.stat().st_size for path in folder.iterdir())
    return features, {"states": len(features.cut.taps), "bytes_per_example": size // len(data),
                      "fill_ms_per_example": round(1e3 * seconds, 2)}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    pick = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return {"median": round(statistics.median(values), 4), "p10": round(pick(0.1), 4), "p90": round(pick(0.9), 4),
            "pairs": len(values)}


def measured(model: nn.Module, pairs: bool, rounds: int, home: Path) -> dict[str, Any]:
    data, steps, facts = rows(pairs), {}, {}
    for name, method in methods(pairs).items():
        delta = st.attach(model, method, name=name)
        features, facts[name] = filled(delta, data, home / name)
        steps[name], steps[f"{name} cached"] = stepper(delta, data, None), stepper(delta, data, features)
    for name, method in (("lora", st.methods.LoRA(rank=8)), ("full", st.methods.Full())):
        steps[name] = stepper(st.attach(model, method, name=name), data, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    found: dict[str, Any] = {name: {"ms": round(1e3 * statistics.median(times[name]), 1)} for name in ("lora", "full")}
    for name in facts:
        cached = times[f"{name} cached"]
        ratios = {f"cached_over_{other}": spread([a / b for a, b in zip(cached, times[key], strict=True)])
                  for other, key in (("own", name), ("lora", "lora"), ("full", "full"))}
        found[name] = {"ms": round(1e3 * statistics.median(times[name]), 1),
                       "cached_ms": round(1e3 * statistics.median(cached), 1), **ratios, **facts[name]}
        if name in GOALS:
            found[name]["goals"] = GOALS[name]
    return found


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "threads": threads, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "slimtune": st.__version__,
            "load_average": [round(x, 2) for x in os.getloadavg()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks of width 64, two rounds: whether it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("bert", "t5"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(options.threads),
                              "batch": {"examples": BATCH, "tokens": TOKENS, "target": TARGET}}
    for name, build, pairs in (("bert", bert, False), ("t5", t5, True)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as home:
                result[name] = measured(build(options.quick), pairs, 2 if options.quick else options.rounds, Path(home))
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
