"""Time and memory of a private step, beside the same step without privacy and beside Opacus, on the same batches.

    python benchmarks/privacy.py [--threads 1] [--rounds 4] [--models bert gpt2] [--methods lora full] [--quick]
                                 [--out benchmarks/results/privacy.json]

BERT-base and GPT-2 at random values, batch 4, 128 tokens, no dropout. A step is forward, backward and fused AdamW; a
private one also takes each example's gradient, clips, and adds noise. Each method has a process of its own. In each
round every kind of step is taken once, in turn, so that a ratio is of steps taken within seconds of each other; given
are medians of those ratios over rounds, with the lowest and the highest. With one thread the time is the process' on
the CPU, which other work on the machine disturbs less; with more it is the clock's. Memory is the peak of resident
memory over two steps less what was resident before the first: activations, gradients and AdamW's state; the weights
are not in it. GPT-2 as a language model has no head to train alone.

Opacus (benchmarks/privacy_peer.py) runs the same method made of plain modules or by PEFT, each of its modes that
gives the right gradients at a small size in the same run; the modes that do not are named. Where it has no form of a
method (IA3, Compacter) there is none.
"""
import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from attach import machine
from privacy_peer import PEERS, modes, peer_step
from torch import nn

import slimtune as st
from slimtune.privacy import Ledger, PrivacySpec, PrivateStep
from slimtune.privacy.draws import new_secret
from slimtune.train.memory import PeakMemory
from slimtune.train.state import adamw

BATCH, TOKENS = 4, 128
METHODS = {"lora": st.methods.LoRA(rank=16), "pfeiffer": st.methods.Pfeiffer(), "compacter": st.methods.Compacter(),
           "ia3": st.methods.IA3(), "prefix": st.methods.PrefixTuning(length=16), "bitfit": st.methods.BitFit(),
           "head": st.methods.LinearProbe(), "full": st.methods.Full()}
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Options of mallopt."""


def build(family: str, small: bool) -> nn.Module:
    layers, width, words = (2, 64, 1000) if small else (12, 768, 30_522 if family == "bert" else 50_257)
    torch.manual_seed(0)
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=max(2, width // 64), vocab_size=words, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, vocab_size=words,
        num_attention_heads=max(2, width // 64), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def batch_of(family: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (BATCH, TOKENS), generator=draw)
    return {"input_ids": ids, "labels": ids if family == "gpt2" else torch.randint(0, 2, (BATCH,), generator=draw)}


class Ours:
    """The plain and the private step of a method on one model."""

    def __init__(self, family: str, method: str, small: bool) -> None:
        self.delta = st.attach(build(family, small), METHODS[method])
        self.delta.model.train()
        self.batch = batch_of(family)
        self.trained = sum(p.numel() for p in self.delta.parameters())

    def plain(self) -> Callable[[], object]:
        optimizer = adamw(self.delta, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            self.delta.model(**self.batch).loss.backward()
            optimizer.step()
        return step

    def private(self) -> Callable[[], object]:
        optimizer = adamw(self.delta, lr=1e-4)
        ledger = Ledger(PrivacySpec(noise_multiplier=1.0, delta=1e-5, accountant="rdp"), 10_000, BATCH, 1_000_000)
        private, number = PrivateStep(self.delta, optimizer, ledger, new_secret(0)), iter(range(1, 1_000_000))

        def step() -> None:
            private.begin()
            private.add(self.batch)
            private.finish(next(number), watch=False)
            optimizer.step()
            optimizer.zero_grad()
        return step


def peak(make: Callable[[], Callable[[], object]]) -> tuple[float, Callable[[], object]]:
    """MB that two steps take at most, above what was there before; and the step. What is freed leaves the process."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    gc.collect()
    libc.malloc_trim(0)
    memory = PeakMemory()
    step = make()
    step()
    step()
    found = memory.peak() - memory.start
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)       # the C library's own default, at its largest
    libc.mallopt(TRIM_THRESHOLD, 1 << 28)
    return found, step


def one(family: str, method: str, rounds: int, small: bool, peers: bool) -> dict[str, Any]:
    """All figures of a method: in a process of its own."""
    ours = Ours(family, method, small)
    makes: dict[str, Callable[[], Callable[[], object]]] = {"plain": ours.plain, "private": ours.private}
    right, wrong = modes(family, method, build(family, True), batch_of(family)) if peers else ([], {})
    for mode in right:
        makes[f"opacus {mode}"] = partial(peer_step, family, method, mode, build(family, small), ours.batch)
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {key: [] for key in makes}
    steps: dict[str, Callable[[], object]] = {}

    def tried(key: str, action: Callable[[], object]) -> None:
        """A mode of Opacus that is right at a small size and fails here is told, and taken out."""
        try:
            action()
        except Exception as error:
            if key in ("plain", "private"):
                raise
            wrong[key.rpartition(" ")[2]] = f"{type(error).__name__}: {error}"[:100]
            for known in (memory, times, steps):
                known.pop(key, None)

    for key, make in makes.items():
        tried(key, lambda key=key, make=make: _measure(key, make, memory, steps))
        ours.delta.model.zero_grad()
    for i in range(rounds + 1):
        for key, step in list(steps.items()):
            tried(key, lambda key=key, step=step, i=i: _timed(step, times[key], i > 0))
    return {"trained": ours.trained, "wrong": wrong, "kinds": {key: _row(key, times, memory) for key in steps}}


def _measure(key: str, make: Callable[[], Callable[[], object]], memory: dict[str, float],
             steps: dict[str, Callable[[], object]]) -> None:
    memory[key], steps[key] = peak(make)


def _timed(step: Callable[[], object], times: list[float], kept: bool) -> None:
    """The first round only warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    step()
    if kept:
        times.append(clock() - begin)


def _row(key: str, times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    ratios = sorted(b / a for a, b in zip(times["plain"], times[key], strict=True))
    return {"seconds": statistics.median(times[key]), "time": statistics.median(ratios),
            "spread": [ratios[0], ratios[-1]], "mb": memory[key], "memory": memory[key] / max(memory["plain"], 1)}


def show(family: str, method: str, found: dict[str, Any]) -> None:
    for key, row in found["kinds"].items():
        print(f"{family:5} {method:10} {key:18} {row['seconds']:6.2f} s  {row['time']:.2f} ({row['spread'][0]:.2f} to "
              f"{row['spread'][1]:.2f})  {row['mb']:7.0f} MB  {row['memory']:.2f}", flush=True)
    for mode, why in found["wrong"].items():
        print(f"{family:5} {method:10} opacus {mode}: {why}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: only shows that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["bert", "gpt2"], choices=["bert", "gpt2"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(one(*options.one, options.rounds, options.quick, options.peers)))
        return
    found: dict[str, Any] = {**machine(options.threads), "quick": options.quick, "batch": BATCH,
                             "tokens": TOKENS, "rounds": options.rounds, "peers": sorted(PEERS), "methods": {}}
    for family in options.models:
        for method in options.methods:
            if (family, method) == ("gpt2", "head"):
                continue
            command = [sys.executable, __file__, "--one", family, method, "--rounds", str(options.rounds),
                       "--threads", str(options.threads), *(["--quick"] if options.quick else []),
                       *([] if options.peers else ["--no-peers"])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{family} {method}: {done.stderr[-2000:]}")
            found["methods"][f"{family}/{method}"] = json.loads(done.stdout.splitlines()[-1])
            show(family, method, found["methods"][f"{family}/{method}"])
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
