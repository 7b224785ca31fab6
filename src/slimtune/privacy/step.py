"""PrivateStep: from the batches of one step to one noisy gradient, by Opacus' optimizers.

    g_i = gradient of example i's loss,     over all that the delta trains
    G   = (sum_i c(g_i) + N(0, sigma^2 C^2 I)) / B

B is the expected number of examples, whatever was drawn. c clips: see PrivacySpec.clipping. One backward pass gives
all of it: norms first, then the sum (see core/bookkeeping.py).
"""
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from slimtune.core.bookkeeping import Rows
from slimtune.core.delta import Delta
from slimtune.core.examples import per_example
from slimtune.core.mask import mask_gradients
from slimtune.errors import DeltaError
from slimtune.privacy.clipping import agreed, dp_optimizer, join
from slimtune.privacy.draws import rekey
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.losses import example_losses


class PrivateStep:
    """The gradient of one step: `begin()`, `add(batch)` for each of its batches, `finish(step)`; then p.grad is set.

    secret: what the noise is made from (see draws.py).
    group: processes of torch.distributed that share each step. Each adds examples of its own, such as every second of
    `poisson(step.secret, ...)`; their sums are joined, and one noise is added, the same everywhere, from the first
    process' secret. All call `finish`, also those without examples.

    Errors: DeltaError when a trained tensor has no gradient for each example.
    """

    def __init__(self, delta: Delta, optimizer: torch.optim.Optimizer, ledger: Ledger, secret: Tensor,
                 group: Any = None) -> None:
        self.delta, self.ledger, self.group = delta, ledger, group
        self.named = dict(delta.named_parameters())
        self.live: set[str] = set()
        device = next(iter(self.named.values())).device
        self.secret = secret if group is None else agreed(secret, group, device)
        self.optimizer = dp_optimizer(optimizer, ledger, torch.Generator(device))
        held = {id(p) for p in self.optimizer.params}
        if held != {id(p) for p in self.named.values()}:
            raise DeltaError("the optimizer does not hold exactly what the delta trains.",
                             "Make it from delta.parameters().")
        self.optimizer.attach_step_hook(lambda _: ledger.charge())
        self.begin()

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.named.values():
            p.summed_grad = None  # type: ignore[attr-defined]

    def add(self, batch: Mapping[str, Any], context: Callable[[], Any] = nullcontext) -> Tensor:
        """Add the clipped gradients of some examples, and give their losses. context: of the forward pass."""
        with per_example(self.delta.model) as grads:
            with context():
                losses = example_losses(self.delta.model, batch)
            losses.sum().backward()
            found = grads.take()
        self.take(found, len(losses))
        return losses.detach()

    def take(self, found: dict[str, Rows], size: int) -> None:
        """Add the clipped gradients of `size` examples, by name of state; `found` is emptied.

        Errors: DeltaError for a tensor without a gradient for each of them, or with one for all of them.
        """
        rows, masks = {}, self.delta.masks
        for name, p in self.named.items():
            one = found.pop(name, None)
            if one is None or one.shape != p.shape or one.size != size:
                told = None if one is None else (one.size, *one.shape)
                raise DeltaError(f"{name} has gradients of shape {told} for {size} examples.",
                                 f"Each of them needs one, {(size, *p.shape)}. Is another delta active?")
            if p.grad is not None:
                raise DeltaError(f"{name} has a gradient of the whole batch beside those of its examples.",
                                 "The model reads it outside of the module that it stands in, past the clipping.")
            one.mask = masks[name].to(p.device) if name in masks else None
            rows[id(p)] = one
        self.optimizer.rows = [rows.pop(id(p)) for p in self.optimizer.params]
        self._opacus(skip=True)

    def _opacus(self, skip: bool) -> None:
        """Clip and add up; without `skip` add noise as well, charge, and set the gradients."""
        for p in self.named.values():
            p.grad_sample = p.new_zeros(0)  # type: ignore[attr-defined]
        self.optimizer.signal_skip_step(skip)
        self.optimizer.pre_step()
        for p in self.named.values():
            p.grad_sample = None  # type: ignore[attr-defined]

    def finish(self, step: int, watch: bool = True) -> None:
        """Add the noise of a step, charge the ledger, divide, and set the gradients; also for a step without examples.

        What the methods add to the loss by themselves (Delta.penalty) holds no data, and is added behind the noise.
        Of what masks hold at 0 the gradient is 0: neither clipped with the rest, nor noised.
        watch: set `live`, the names of state with a gradient of the step's examples, before noise.
        """
        if self.group is not None:
            join(self.optimizer, self.group)
        sums = {name: getattr(p, "summed_grad", None) for name, p in self.named.items()} if watch else {}
        self.live = {name for name, total in sums.items() if total is not None and bool(total.any())}
        rekey(self.optimizer.generator, self.secret, f"noise of step {step}")
        self._opacus(skip=False)
        extra = self.delta.penalty()
        if extra is not None:
            values = list(self.named.values())
            for p, grad in zip(values, torch.autograd.grad(extra, values, allow_unused=True), strict=True):
                if grad is not None:
                    p.grad += grad  # type: ignore[operator]
        mask_gradients(self.delta)

    @property
    def clip(self) -> float:
        """The clip as it is now: an adaptive one moves."""
        return float(self.optimizer.max_grad_norm)

    @clip.setter
    def clip(self, value: float) -> None:
        self.optimizer.max_grad_norm = value

    def close(self) -> None:
        """Take off what Opacus hung on the parameters."""
        for p in self.named.values():
            for name in ("grad_sample", "summed_grad"):
                if hasattr(p, name):
                    delattr(p, name)
