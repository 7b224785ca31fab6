"""Step time and saved bytes of visual prompts, and of FacT, LoRA and an adapter, on one ViT-B/16 in one process.

    python benchmarks/vpt.py [--quick] [--threads 2] [--batch 8] [--out benchmarks/results/vision.json]

ViT-B/16 at random values, 224 pixels, head of 100 classes. Prompts: VPT-deep of 50 tokens by keys and values and as
tokens, over p = 0: a frozen body behind which a token of the input trains, with the head, so that backward runs
through every block. Methods: FacT-TT of rank 16 and a bottleneck adapter of width 8 over modules written by hand for
this model, LoRA of rank 8 on q and v over PEFT's; all drop nothing. Times: forward and backward, taken in turn,
ratios of pairs as median with the spread from the 10th to the 90th percentile. Saved bytes: distinct storages that
autograd keeps for backward, parameters apart. All models share one frozen body.
"""
import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from attach import machine, saved_bytes, spread, stepper
from torch import Tensor, nn

import slimtune as st

LENGTH, CLASSES = 50, 100
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


class Bodies:
    """Models that share one frozen body; each has a head of its own."""

    def __init__(self, quick: bool) -> None:
        self.config = transformers.ViTConfig(num_labels=CLASSES, **(SMALL if quick else {}))
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

    def ours(self, method: st.Method) -> nn.Module:
        made = self.model()
        st.attach(made, method)
        return made

    def floor(self) -> nn.Module:
        """p = 0: a token that is added to the input, and the head."""
        made = self.model()
        made.vit.embeddings.register_parameter("token", nn.Parameter(torch.zeros(self.config.hidden_size)))
        made.vit.embeddings.register_forward_hook(lambda m, a, out: out + m.token)
        return made

    def peft_lora(self) -> nn.Module:
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                                 modules_to_save=["classifier"])
        return peft.get_peft_model(self.model(), config)

    def by_hand(self, kind: str) -> nn.Module:
        """A model whose linear maps, or MLPs, are modules with the method's numbers."""
        made, d = self.model(), self.config.hidden_size
        U, V = nn.Parameter(torch.randn(16, d) * 0.02), nn.Parameter(torch.zeros(d, 16))
        for block in made.vit.layers:
            if kind == "adapter":
                block.mlp = AdapterMLP(block.mlp, d, 8)
                continue
            for holder in (block.attention, block.mlp):
                for name in ADAPTED:
                    if hasattr(holder, name):
                        setattr(holder, name, FactLinear(getattr(holder, name), U, V))
        return made


class FactLinear(nn.Module):
    """y + x U Sigma V^T, the d x d slices of a map that is wider side by side in one product."""

    def __init__(self, linear: nn.Linear, U: nn.Parameter, V: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.U, self.V, r = linear, U, V, U.shape[0]
        self.wide = linear.out_features > linear.in_features
        slices = max(linear.in_features, linear.out_features) // U.shape[1]
        self.core = nn.Parameter(torch.randn(slices, r, r) * r**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            A, B = self.U, (self.V @ self.core.mT).flatten(0, 1)
        else:
            A, B = (self.core.mT @ self.U).transpose(0, 1).flatten(1), self.V
        return self.linear(x) + F.linear(F.linear(x, A), B)


class AdapterMLP(nn.Module):
    """h + up(GELU(down(h))) behind an MLP."""

    def __init__(self, mlp: nn.Module, d: int, width: int) -> None:
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return h + self.up(F.gelu(self.down(h)))


def paired(ours: Callable[[], float], other: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of both in milliseconds and the spread of their ratio, taken in turn."""
    a, b = zip(*((ours(), other()) for _ in range(pairs)), strict=True)
    return {"ours_ms": round(1e3 * statistics.median(a), 2), "other_ms": round(1e3 * statistics.median(b), 2),
            "ratio": spread([x / y for x, y in zip(a, b, strict=True)])}


def compared(name: str, other: str, ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor],
             pairs: int) -> dict[str, Any]:
    a, b = saved_bytes(ours, inputs), saved_bytes(theirs, inputs)
    row: dict[str, Any] = {"what": name, "over": other,
                           "saved_bytes": {"ours": a, "other": b, "ratio": round(a / b, 4)},
                           "step": paired(stepper(ours, inputs), stepper(theirs, inputs), pairs)}
    for who, model in (("ours", ours), ("other", theirs)):
        row[f"{who}_trains"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps(row), flush=True)
    return row


def prompts(bodies: Bodies, inputs: dict[str, Tensor], pairs: int) -> list[dict[str, Any]]:
    rows = []
    for path in ("keys", "tokens"):
        for dropout in (0.1, 0.0):
            ours = bodies.ours(st.methods.get("vpt")(length=LENGTH, path=path, dropout=dropout))
            rows.append(compared(f"VPT-deep, {LENGTH} tokens, path={path}, dropout {dropout}", "p = 0", ours,
                                 bodies.floor(), inputs, pairs))
    return rows


def methods(bodies: Bodies, inputs: dict[str, Tensor], pairs: int) -> list[dict[str, Any]]:
    named = (("FacT-TT, rank 16", "by hand", st.methods.FacT(form="tt", rank=16), lambda: bodies.by_hand("fact")),
             ("LoRA, rank 8, q and v", "PEFT", st.methods.LoRA(rank=8, alpha=16), bodies.peft_lora),
             ("adapter, width 8", "by hand", st.methods.Pfeiffer(bottleneck=8, activation="gelu"),
              lambda: bodies.by_hand("adapter")))
    return [compared(name, other, bodies.ours(method), make(), inputs, pairs) for name, other, method, make in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few pairs: whether it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bodies, pairs = Bodies(options.quick), 2 if options.quick else options.pairs
    inputs = bodies.inputs(options.batch)
    result = {"machine": machine(options.threads), "batch": options.batch, "prompts": prompts(bodies, inputs, pairs),
              "methods": methods(bodies, inputs, pairs)}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
