"""Step time and memory of visual prompts, FacT, LoRA and an adapter on ViT-B/16, and inference after a merge.

    python benchmarks/vpt.py [--quick] [--threads 2] [--batch 8] [--rounds 7] [--only steps|memory|merged]
                             [--out benchmarks/results/vision.json]

ViT-B/16 at random values, 224 pixels, head of 100 classes. VPT-deep of 50 tokens, by keys and values and as tokens,
over p = 0: a frozen body behind which a token of the input trains, with the head, so that backward runs through every
block; and over prompts written by hand. FacT-TT of rank 16, LoRA of rank 8 on q and v and an adapter of width 8 over
modules written by hand for this model (`vision_peers.py`), LoRA over PEFT's too. Where nothing else is said nothing is
dropped.

Steps: forward and backward. Each round runs every model once, forwards and backwards in turn; ratios of a round, as
median with the spread from the 10th to the 90th percentile. Saved bytes: distinct storages that autograd keeps for
backward, parameters apart. Peak: resident memory above that before the first step, two steps of AdamW, each model in a
process of its own. Merged: operations (names and shapes) of a forward pass, beside those of the bare model; whether the
merged weights in a bare model, which has no module of ours, give the same logits; time over the bare model's.
"""
import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from attach import clock, machine, saved_bytes, spread, stepper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vision_peers import FACT_RANK, LENGTH, RANK, WIDTH, put

import slimtune as st
from slimtune.train.memory import PeakMemory

M: Any = st.methods
CLASSES = 100
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
OURS: dict[str, st.Method] = {
    "VPT, keys": M.VPT(length=LENGTH, path="keys", dropout=0.0),
    "VPT, keys, dropout 0.1": M.VPT(length=LENGTH, path="keys", dropout=0.1),
    "VPT, tokens": M.VPT(length=LENGTH, path="tokens", dropout=0.0),
    "FacT": M.FacT(form="tt", rank=FACT_RANK), "LoRA": M.LoRA(rank=RANK, alpha=16),
    "adapter": M.Pfeiffer(bottleneck=WIDTH, activation="gelu")}
PEERS = {"VPT by hand": "vpt", "FacT by hand": "fact", "LoRA by hand": "lora", "adapter by hand": "adapter"}
PAIRS = (("VPT, keys", "p = 0"), ("VPT, keys, dropout 0.1", "p = 0"), ("VPT, tokens", "p = 0"),
         ("VPT, keys", "VPT, tokens"), ("VPT, keys", "VPT by hand"), ("FacT", "FacT by hand"),
         ("LoRA", "LoRA by hand"), ("LoRA", "LoRA of PEFT"), ("adapter", "adapter by hand"))
NAMES = list(dict.fromkeys(name for pair in PAIRS for name in pair))
GROUPS = [[name for name in NAMES if name.startswith(words)] for words in (("VPT", "p"), "FacT", "LoRA", "adapter")]
MERGED: dict[str, st.Method] = {"FacT": OURS["FacT"], "KAdaptation": M.KAdaptation(), "LoRA": OURS["LoRA"],
                                "SSF": M.SSF(), "RepAdapter": M.RepAdapter()}


class Bodies:
    """Models that share one frozen body; each has a head of its own."""

    def __init__(self, quick: bool) -> None:
        values: dict[str, Any] = {"num_labels": CLASSES} | (SMALL if quick else {})
        self.config = transformers.ViTConfig(**values)
        torch.manual_seed(0)
        self.state = transformers.ViTForImageClassification(self.config).state_dict()

    def model(self) -> Any:
        with torch.device("meta"):
            made = transformers.ViTForImageClassification(self.config)
        made.load_state_dict({n: v.clone() if n.startswith("classifier") else v for n, v in self.state.items()},
                             assign=True)
        made.vit.requires_grad_(False)
        return made

    def inputs(self, size: int) -> dict[str, Tensor]:
        pixels = torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "labels": torch.arange(size) % CLASSES}

    def named(self, name: str) -> nn.Module:
        """A model of NAMES."""
        made = self.model()
        if name in OURS:
            st.attach(made, OURS[name])
        elif name in PEERS:
            put(made, PEERS[name])
        elif name == "p = 0":
            made.vit.embeddings.register_parameter("token", nn.Parameter(torch.zeros(self.config.hidden_size)))
            made.vit.embeddings.register_forward_hook(lambda m, a, out: out + m.token)
        else:
            made = peft.get_peft_model(made, peft.LoraConfig(
                r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
        return made


def compared(name: str, other: str, values: dict[str, Any]) -> dict[str, Any]:
    """Ratios of one over another, of each figure."""
    a, b = values[name], values[other]
    row: dict[str, Any] = {"what": name, "over": other}
    if "steps" in a:
        row["step"] = {"ms": round(1e3 * statistics.median(a["steps"]), 1),
                       "other_ms": round(1e3 * statistics.median(b["steps"]), 1),
                       "ratio": spread([x / y for x, y in zip(a["steps"], b["steps"], strict=True)])}
    for key in ("saved_bytes", "peak_mb", "trains"):
        if key in a:
            row[key] = {"own": a[key], "other": b[key], "ratio": round(a[key] / b[key], 4)}
    return row


def steps(bodies: Bodies, inputs: dict[str, Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step of every model in every round, bytes saved, numbers trained; those of a method together."""
    found: dict[str, dict[str, Any]] = {}
    for names in GROUPS:
        models = {name: bodies.named(name) for name in names}
        for name, model in models.items():
            found[name] = {"saved_bytes": saved_bytes(model, inputs), "steps": [],
                           "trains": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        runs = {name: stepper(model, inputs) for name, model in models.items()}
        for turn in range(rounds):
            for name in names[::-1 if turn % 2 else 1]:
                found[name]["steps"].append(runs[name]())
    return found


def peak(name: str, options: argparse.Namespace) -> float:
    """MiB above the start of two steps of AdamW. To be called in a fresh process."""
    bodies = Bodies(options.quick)
    model, inputs = bodies.named(name).train(), bodies.inputs(options.batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    memory = PeakMemory()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        optimizer.step()
    return round(memory.peak() - memory.start, 1)


def in_a_process(name: str, options: argparse.Namespace) -> float:
    call = [sys.executable, __file__, "--peak", name, "--threads", str(options.threads), "--batch", str(options.batch)]
    done = subprocess.run([*call, *(["--quick"] if options.quick else [])], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


class Operations(TorchDispatchMode):
    """The names of all operations and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(out.shape) if isinstance(out, Tensor) else None))
        return out


@torch.no_grad()
def operations(model: nn.Module, pixels: Tensor) -> tuple[list[Any], Tensor]:
    with Operations() as mode:
        out = model(pixel_values=pixels).logits
    return mode.seen, out


def merged(bodies: Bodies, inputs: dict[str, Tensor], rounds: int) -> list[dict[str, Any]]:
    """Each method merged, beside the bare model, in inference."""
    pixels = inputs["pixel_values"]
    bare, models = bodies.model().eval(), {}
    (wanted, base), rows = operations(bare, pixels[:2]), []
    for name, method in MERGED.items():
        model = bodies.model().eval()
        delta = st.attach(model, method, seed=1)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        attached = operations(model, pixels[:2])[1]
        delta.merge()
        seen, out = operations(model, pixels[:2])
        plain = bodies.model().eval()
        plain.load_state_dict({n: v.clone() for n, v in model.state_dict().items() if ".slimtune" not in f".{n}"})
        rows.append({"what": name, "merged_to_attached": _gap(out, attached), "attached_to_bare": _gap(attached, base),
                     "same_operations": seen == wanted,
                     "operations": len(seen), "plain_model_same_logits": torch.equal(
                         operations(plain, pixels[:2])[1], out)})
        models[name] = model
    times = _inference(models | {"bare": bare}, pixels, rounds)
    for row in rows:
        own = times[row["what"]]
        row["ms"], row["bare_ms"] = (round(1e3 * statistics.median(t), 1) for t in (own, times["bare"]))
        row["over_bare"] = spread([a / b for a, b in zip(own, times["bare"], strict=True)])
        print(json.dumps(row), flush=True)
    return rows


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits."""
    return float((a - b).abs().max())


@torch.no_grad()
def _inference(models: dict[str, nn.Module], pixels: Tensor, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in models}
    runs: dict[str, Callable[[], Any]] = {name: lambda m=model: m(pixel_values=pixels)
                                          for name, model in models.items()}
    for turn in range(rounds + 1):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            seconds = clock(runs[name])
            if turn:  # the first warms up
                found[name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: whether it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("steps", "memory", "merged"))
    parser.add_argument("--peak", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options))
        return
    rounds = 2 if options.quick else options.rounds
    bodies, values = Bodies(options.quick), {name: {} for name in NAMES}
    inputs = bodies.inputs(options.batch)
    result: dict[str, Any] = {"machine": machine(options.threads), "batch": options.batch}
    if options.only in (None, "steps"):
        values = steps(bodies, inputs, rounds)
    if options.only in (None, "memory"):
        for name, row in values.items():
            row["peak_mb"] = in_a_process(name, options)
    if options.only != "merged":
        result["training"] = [compared(*pair, values) for pair in PAIRS]
        print("\n".join(map(json.dumps, result["training"])), flush=True)
    if options.only in (None, "merged"):
        result["merged"] = merged(bodies, inputs, 2 * rounds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
