"""What a conformance check is given, how it is registered, and the small tools that checks share."""
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD
from slimtune.core.method import Method
from slimtune.testing.tiny import batch, output, tiny


class Skip(Exception):  # noqa: N818
    """A check that has no meaning for this pair; its text is the reason, and is shown in the report."""


@dataclass(frozen=True)
class Check:
    """One named property of a method on a backbone. slow: seconds, so only on demand."""

    name: str
    run: "Callable[[Case], None]"
    slow: bool = False

    @property
    def title(self) -> str:
        return (self.run.__doc__ or self.name).partition("\n")[0]


CHECKS: list[Check] = []


def check(slow: bool = False) -> Callable[["Callable[[Case], None]"], "Callable[[Case], None]"]:
    """Register a function of a `Case` as a conformance check; its docstring's first line is its title.

    Raise AssertionError where the property fails, and Skip where it has no meaning.
    """
    def add(run: "Callable[[Case], None]") -> "Callable[[Case], None]":
        CHECKS.append(Check(run.__name__, run, slow))
        return run
    return add


@cache
def _pristine(backbone: str, seed: int) -> nn.Module:
    return tiny(backbone, seed)


@dataclass
class Case:
    """One method on one tiny backbone. Every model it hands out is a fresh copy.

    notes: what a check found that is no failure, such as tensors that never move.
    """

    method: Method
    backbone: str
    notes: list[str] = field(default_factory=list)

    def base(self, seed: int = 0) -> nn.Module:
        """The plain backbone, in eval mode."""
        return copy.deepcopy(_pristine(self.backbone, seed))

    def attached(self, name: str = "default", seed: int = 0, **changes: object) -> tuple[nn.Module, Delta]:
        """A backbone with the method on it, as it starts."""
        model = self.base()
        method = self.method.model_copy(update=changes) if changes else self.method
        return model, attach(model, method, name, seed=seed)

    def moved(self, name: str = "default", seed: int = 0) -> tuple[nn.Module, Delta]:
        """A backbone with the method on it, its trained values away from their start."""
        model, delta = self.attached(name)
        scramble(delta, seed)
        return model, delta

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return batch(self.backbone)

    @cached_property
    def plain(self) -> Tensor:
        """The backbone's own output."""
        return run(self.base(), self.inputs)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The output of a forward without a graph, as a copy."""
    return output(model, inputs).clone()


@torch.no_grad()
def scramble(delta: Delta, seed: int = 0, std: float = 0.1) -> None:
    """Add N(0, std^2) to every trained value, so that no zero at the start hides a mistake."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in delta.parameters():
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * std)


def values(delta: Delta) -> dict[str, Tensor]:
    """A copy of all values of a delta."""
    return {n: t.clone() for n, t in delta.state().items()}


def gradients(delta: Delta) -> dict[str, Tensor]:
    """The gradients of what a delta trains; zero where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in delta.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    """Fail unless two sets of tensors are bitwise equal; name those that differ."""
    assert a.keys() == b.keys(), f"{what}: other names: {sorted(a.keys() ^ b.keys())[:6]}"
    wrong = [n for n in a if not identical(a[n], b[n])]
    assert not wrong, f"{what}: {len(wrong)} of {len(a)} tensors differ: {wrong[:6]}"


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of b."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))


def close(a: Tensor, b: Tensor, what: str, bound: float = 1e-5) -> None:
    found = error(a, b)
    assert found <= bound, f"{what}: relative error {found:.2e}, allowed {bound:.0e}"


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without what stands under our children."""
    return {k: v.clone() for k, v in model.state_dict().items() if CHILD not in k.split(".")}


def outline(model: nn.Module) -> dict[str, object]:
    """Everything about a model's structure that attaching could leave changed, for comparison."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
        tensors = {n: (id(p), p.requires_grad) for n, p in module._parameters.items() if p is not None}
        found[path] = (type(module).__name__, sorted(vars(module)), hooks, list(module._modules), tensors,
                       list(module._buffers), module.training, "forward" in vars(module))
    config = getattr(model, "config", None)
    for c in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if c is not None:
            found[f"config {type(c).__name__}"] = (getattr(c, "_attn_implementation", None), sorted(vars(c)))
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The places at which two outlines differ."""
    return [path or "(the model)" for path in before | after if before.get(path) != after.get(path)]


@contextmanager
def refused(kind: type[Exception], what: str) -> Iterator[None]:
    """Fail unless the block raises this kind of error, with a text."""
    try:
        yield
    except kind as refusal:
        reason = str(refusal).strip()
    else:
        raise AssertionError(f"{what}: was accepted, and should raise {kind.__name__}")
    assert reason, f"{what}: refused without a reason"


def train(model: nn.Module, delta: Delta, inputs: dict[str, Tensor], steps: int = 1, lr: float = 5e-3) -> list[float]:
    """AdamW on one batch; the loss before each step and after the last."""
    from slimtune.testing.tiny import loss

    optimizer = torch.optim.AdamW(delta.parameters(), lr=lr, weight_decay=0.0, fused=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, inputs)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    with torch.no_grad():
        return [*losses, float(loss(model, inputs))]
