"""Memory and step time of ladder side-tuning beside LoRA and full fine-tuning of one T5, in one run.

    python benchmarks/lst.py [--quick] [--threads 2] [--out benchmarks/results/lst.json]

T5-base at random values, source 128 and target 16 tokens, dropout as published. LoRA: rank 32 on q and v;
LST: r = 8, 9 of 12 blocks kept. Times: forward and backward, taken in turn, ratios of pairs as median with
the spread from the 10th to the 90th percentile. Saved bytes: distinct storages that autograd keeps for
backward, parameters apart, and those kept while a block of the backbone runs. Peak: resident memory above
that before the first step, each mode in a process of its own, two steps of AdamW.
"""
import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from attach import clock, machine, saved_bytes, spread
from torch import Tensor, nn

import slimtune as st
from slimtune.train.memory import PeakMemory

MODES = ("full", "lora", "lst")
KEPT = (1, 2, 3, 5, 6, 7, 9, 10, 11)
SMALL = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 500}


def model(mode: str, quick: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """A T5 that trains in one of the modes, and what it trains."""
    base = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "vocab_size": 32128}
    torch.manual_seed(0)
    config = transformers.T5Config(**(SMALL if quick else base), num_layers=12, decoder_start_token_id=0)
    made = transformers.T5ForConditionalGeneration(config).train()
    if mode == "full":
        return made, list(made.parameters())
    method = st.methods.LoRA(rank=32, alpha=32, sites=("attn.q", "attn.v")) if mode == "lora" else st.methods.LST(
        blocks=KEPT)
    return made, list(st.attach(made, method).parameters())


def batch(size: int, quick: bool) -> dict[str, Tensor]:
    words, generator = SMALL["vocab_size"] if quick else 32_000, torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, words, (size, 128), generator=generator),
            "labels": torch.randint(5, words, (size, 16), generator=generator)}


def peak(mode: str, size: int, quick: bool) -> dict[str, float]:
    """MiB above the start, and in all, of two steps of AdamW. To be called in a fresh process."""
    made, trained = model(mode, quick)
    optimizer, inputs = torch.optim.AdamW(trained), batch(size, quick)
    memory = PeakMemory()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        made(**inputs).loss.backward()
        optimizer.step()
    return {"added": round(memory.peak() - memory.start, 1), "peak": round(memory.peak(), 1)}


def backbone_bytes(made: nn.Module, inputs: dict[str, Tensor]) -> int:
    """What autograd keeps of the forward of the backbone's blocks, without our hooks behind them."""
    inside, kept = [0], {}
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside[0] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                inside[0] -= 1
        return run

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if inside[0] and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    blocks = list(_blocks(made))
    for block in blocks:
        block.forward = counted(block.forward)  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = made(**inputs).loss
    total = sum(kept.values())
    for block in blocks:
        del block.forward
    del loss
    return total


def _blocks(made: Any) -> Iterator[nn.Module]:
    yield from made.encoder.block
    yield from made.decoder.block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small T5, two pairs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.batch, options.quick)))
        return
    result = {"machine": machine(options.threads), "batch": options.batch, "source": 128, "target": 16,
              "model": "small T5" if options.quick else "T5-base", "modes": measure(options)}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {mode: {"memory_mb": _in_a_process(mode, options)} for mode in MODES}
    inputs, steps = batch(options.batch, options.quick), {}
    for mode in MODES:
        made, trained = model(mode, options.quick)
        rows[mode]["trained"] = sum(p.numel() for p in trained)
        rows[mode]["saved_bytes"] = saved_bytes(made, inputs)
        rows[mode]["saved_bytes_of_backbone_blocks"] = backbone_bytes(made, inputs)
        steps[mode] = lambda made=made: clock(lambda: made(**inputs).loss.backward())
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(3 if options.quick else 8):
        for mode, step in steps.items():
            seconds = step()
            if turn:  # the first warms up
                times[mode].append(seconds)
    for mode, row in rows.items():
        row["step_ms"] = round(1e3 * statistics.median(times[mode]), 1)
        row["over_full"] = {"step": spread([a / b for a, b in zip(times[mode], times["full"], strict=True)]),
                            "added_memory": round(row["memory_mb"]["added"] / rows["full"]["memory_mb"]["added"], 3),
                            "saved_bytes": round(row["saved_bytes"] / rows["full"]["saved_bytes"], 3)}
    return rows


def _in_a_process(mode: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", mode, "--batch", str(options.batch), "--threads",
               str(options.threads), *(["--quick"] if options.quick else [])]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
