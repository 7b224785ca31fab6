"""Opacus' private step of a method, made of plain modules or by PEFT, and whether its gradients are right.

Plain modules where Opacus reads them: full, BitFit, a head, adapters. PEFT for LoRA and prefix tuning. Positions are
given for each example, without which Opacus has one gradient for all of BERT's positions. IA3 and Compacter have no
form in which it finds gradients.
"""
import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = ("lora", "pfeiffer", "prefix", "bitfit", "head", "full")
MODES = ("hooks", "ew", "functorch", "ghost")
Batch = Mapping[str, Tensor]


class Adapter(nn.Module):
    """A linear map, and a bottleneck adapter behind it."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(width, width // 16), nn.Linear(width // 16, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.up(F.relu(self.down(y)))


class Inputs(nn.Module):
    """The model, with positions of each example, and its logits as output."""

    def __init__(self, model: Any, positions: bool) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, ids: Tensor) -> Tensor:
        places = {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)} if self.positions else {}
        return self.model(input_ids=ids, **places).logits


def prepared(family: str, method: str, model: Any) -> nn.Module:
    """The model with what the method trains, and nothing else, trainable."""
    head = "classifier" if family == "bert" else "lm_head"
    if method in ("lora", "prefix"):
        return Inputs(_peft(family, method, model), method == "lora")
    model.requires_grad_(method == "full")
    if method == "pfeiffer":
        for layer in model.bert.encoder.layer if family == "bert" else model.transformer.h:
            owner, name = (layer.output, "dense") if family == "bert" else (layer.mlp, "c_proj")
            setattr(owner, name, Adapter(getattr(owner, name), model.config.hidden_size))
    for name, p in model.named_parameters():
        if (method == "bitfit" and name.endswith("bias")) or (family == "bert" and name.startswith(head)):
            p.requires_grad_(True)
    return Inputs(model, True)


def _peft(family: str, method: str, model: Any) -> nn.Module:
    import peft

    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    if method == "prefix":
        return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=16))
    targets = ["query", "value"] if family == "bert" else ["c_attn"]
    return peft.get_peft_model(model, peft.LoraConfig(
        task_type=task, r=16, lora_alpha=16, target_modules=targets, fan_in_fan_out=family == "gpt2"))


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """One an example."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(
        len(labels), -1).mean(1)


def wrapped(module: nn.Module, mode: str) -> tuple[Any, Any]:
    """Opacus' module and its optimizer."""
    from opacus.grad_sample.utils import get_gsm_class
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    options = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if mode == "ghost" else {}
    made = get_gsm_class(mode)(module.train(), batch_first=True, loss_reduction="sum", **options)
    values = [p for p in module.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(values, lr=1e-4, fused=True)
    kind = DPOptimizerFastGradientClipping if mode == "ghost" else DPOptimizer
    return made, kind(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4, loss_reduction="sum")


def backward(made: Any, optimizer: Any, mode: str, batch: Batch) -> None:
    """Each example's gradient on `p.grad_sample`; in ghost mode their clipped sum on `p.grad`."""
    if mode != "ghost":
        losses(made(batch["input_ids"]), batch["labels"]).sum().backward()
        return
    each = losses(made(batch["input_ids"]), batch["labels"])
    optimizer.zero_grad()
    each.sum().backward(retain_graph=True)
    optimizer.zero_grad()
    factors = made.get_clipping_coef()
    made.disable_hooks()
    (factors * each).sum().backward()
    made.enable_hooks()


def peer_step(family: str, method: str, mode: str, model: Any, batch: Batch) -> Callable[[], object]:
    """One private step of Opacus."""
    made, optimizer = wrapped(prepared(family, method, model), mode)

    def step() -> None:
        backward(made, optimizer, mode, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def modes(family: str, method: str, model: Any, batch: Batch) -> tuple[list[str], dict[str, str]]:
    """(modes whose clipped sum at a small size is that of a loop, why the others are not)."""
    right: list[str] = []
    wrong: dict[str, str] = {}
    for mode in MODES if method in PEERS else ():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                gap = _gap(family, method, mode, model, batch)
        except Exception as error:   # whatever it is, it is told
            wrong[mode] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
            continue
        if gap < 1e-3:
            right.append(mode)
        else:
            wrong[mode] = f"its clipped sum is off by {gap:.1e}"
    return right, wrong


def _gap(family: str, method: str, mode: str, model: Any, batch: Batch) -> float:
    """How far the clipped sum is from a loop's, of the loop's largest number."""
    import copy

    module = prepared(family, method, copy.deepcopy(model))
    values = [p for p in module.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in values]
    for i in range(len(batch["labels"])):
        rows = {key: value[i:i + 1] for key, value in batch.items()}
        grads = torch.autograd.grad(losses(module(rows["input_ids"]), rows["labels"]).sum(), values, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(values, grads, strict=True)]
        factor = min(1.0, 1.0 / (float(torch.stack([g.norm() for g in grads]).norm()) + 1e-6))
        total = [t + factor * g for t, g in zip(total, grads, strict=True)]
    made, optimizer = wrapped(module, mode)
    backward(made, optimizer, mode, batch)
    if mode == "ghost":
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in values]
    else:
        optimizer.clip_and_accumulate()
        found = [p.summed_grad for p in values]
    scale = max(float(t.abs().max()) for t in total)
    return max(float((a.view_as(b) - b).abs().max()) for a, b in zip(found, total, strict=True)) / scale
