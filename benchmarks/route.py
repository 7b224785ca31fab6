"""A batch with a task for each example, beside one delta for all of it, and beside PEFT's `adapter_names`.

    python benchmarks/route.py [--quick] [--threads 2] [--out benchmarks/results/route.json]

BERT-base at random values, LoRA rank 8 on query and value, 64 examples, inference. Every figure is a ratio of pairs
taken in turn in one process, as median with the spread from the 10th to the 90th percentile: routed over one
unrouted delta, and PEFT's mixed batch over PEFT's one adapter. `resident`: bytes of the process' deltas over the sum
of their files.
"""
import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import slimtune as st


def bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(num_hidden_layers=layers)
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def inputs(size: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 30_000, (size, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    pick = lambda q: ordered[round(q * (len(ordered) - 1))]  # noqa: E731
    return {"median": round(statistics.median(values), 4), "p10": round(pick(0.1), 4), "p90": round(pick(0.9), 4),
            "pairs": len(values)}


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pairs(a: Callable[[], object], b: Callable[[], object], number: int) -> dict[str, float]:
    a(), b()
    return spread([clock(a) / clock(b) for _ in range(number)])


def tasks_of(size: int, distinct: int) -> list[str]:
    return [f"t{i % distinct}" for i in range(size)]


def ours(model: nn.Module, batch: dict[str, Tensor], distinct: int, number: int) -> dict[str, float]:
    tasks = tasks_of(len(batch["input_ids"]), distinct)

    def routed() -> None:
        with torch.no_grad(), st.route(model, tasks):
            model(**batch)

    def alone() -> None:
        with torch.no_grad():
            model(**batch)

    st.activate(model, "t0")
    return pairs(routed, alone, number)


def theirs(model: peft.PeftModel, batch: dict[str, Tensor], distinct: int, number: int) -> dict[str, float]:
    names = tasks_of(len(batch["input_ids"]), distinct)

    def mixed() -> None:
        with torch.no_grad():
            model(**batch, adapter_names=names)

    def alone() -> None:
        with torch.no_grad():
            model(**batch)

    model.set_adapter("t0")
    return pairs(mixed, alone, number)


def resident(layers: int, number: int) -> dict[str, Any]:
    """Attach many deltas; their bytes over their files', and what adding one takes."""
    model = bert(layers)
    with tempfile.TemporaryDirectory() as home:
        first = st.attach(model, st.methods.LoRA(rank=8), name="t0")
        first.save(Path(home) / "t0")
        file = sum(p.stat().st_size for p in (Path(home) / "t0").iterdir())
        taken = [clock(lambda i=i: st.load(model, Path(home) / "t0", name=f"t{i}")) for i in range(1, number)]
    held = sum(p.numel() * p.element_size() for d in st.deltas(model).values() for p in d.tensors().values())
    return {"deltas": number, "bytes_over_files": round(held / (file * number), 3),
            "add_ms_first_ten": round(1e3 * statistics.median(taken[:10]), 2),
            "add_ms_last_ten": round(1e3 * statistics.median(taken[-10:]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and few pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, number, size = (2, 3, 16) if options.quick else (12, 9, 64)
    distinct = [1, 8, size]
    model = bert(layers)
    for i in range(size):
        st.attach(model, st.methods.LoRA(rank=8), name=f"t{i}", seed=i)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    peer = peft.get_peft_model(bert(layers), config, adapter_name="t0").eval()
    for i in range(1, size):
        peer.add_adapter(f"t{i}", config)
    rows: dict[str, Any] = {}
    for tokens in (32, 128):
        batch = inputs(size, tokens)
        for d in distinct:
            key = f"{tokens} tokens, {d} tasks"
            rows[key] = {"ours": ours(model, batch, d, number), "peft": theirs(peer, batch, d, number)}
            print(key, json.dumps(rows[key]), flush=True)
    rows["resident"] = resident(layers, 50 if options.quick else 1000)
    print("resident", json.dumps(rows["resident"]), flush=True)
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__,
                   "transformers": transformers.__version__, "peft": peft.__version__}
        options.out.write_text(json.dumps({"machine": machine, "batch": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
