"""Small private steps: a tiny model, a method moved off its start, and Opacus' optimizer over it."""
from typing import Any

import torch
from torch import Tensor

import slimtune as st
from slimtune.core.delta import Delta
from slimtune.privacy.draws import new_secret
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.losses import example_losses
from slimtune.privacy.spec import PrivacySpec
from slimtune.privacy.step import PrivateStep
from slimtune.testing import tiny

BATCH, EXAMPLES = 4, 100


def ledger(sigma: float = 0.0, **values: Any) -> Ledger:
    values = {"delta": 1e-5, "accountant": "rdp", "noise_multiplier": sigma, **values}
    return Ledger(PrivacySpec(**values), EXAMPLES, BATCH, 1000)


def delta_of(family: str, method: Any, **options: Any) -> Delta:
    """In float64, with numbers that are not its start's, where gradients vanish."""
    delta = st.attach(tiny(family, **options).double(), method)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * 0.1)
    return delta


def step_of(delta: Delta, book: Ledger | None = None, optimizer: Any = None) -> PrivateStep:
    optimizer = optimizer or torch.optim.SGD(delta.parameters(), lr=1.0)
    return PrivateStep(delta, optimizer, book or ledger(), new_secret(0))


def texts(count: int, seed: int = 0, classes: bool = True, length: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (count, length), generator=draw)
    lengths = torch.randint(3, length + 1, (count,), generator=draw)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = torch.randint(0, 3, (count,), generator=draw) if classes else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def part(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def loop(delta: Delta, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each example's gradient, by a backward pass of its own on its own."""
    found = []
    for i in range(len(batch["labels"])):
        names, values = zip(*delta.named_parameters(), strict=True)
        loss = example_losses(delta.model, part(batch, slice(i, i + 1))).sum()
        grads = torch.autograd.grad(loss, values, allow_unused=True)
        found.append({n: torch.zeros_like(p) if g is None else g
                      for n, p, g in zip(names, values, grads, strict=True)})
    return found


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in grads.values()]).norm())


def summed(step: PrivateStep, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clipped sum over batches, before noise."""
    step.begin()
    for batch in batches:
        step.add(batch)
    return {name: p.summed_grad.view_as(p).clone() for name, p in step.named.items()}


def plus(grads: list[dict[str, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    return {name: sum(f * g[name] for f, g in zip(factors, grads, strict=True)) for name in grads[0]}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: Any) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **(tolerance or {"rtol": 1e-8, "atol": 1e-12}))
