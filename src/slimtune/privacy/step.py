"""PrivateStep: from the batches of one step to one noisy gradient, by Opacus' optimizers.

    g_i = gradient of example i's loss,     over all that the delta trains
    G   = (sum_i c(g_i) + N(0, sigma^2 C^2 I)) / B

B is the expected number of examples, whatever was drawn. c clips: see PrivacySpec.clipping.
"""
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from slimtune.core.delta import Delta
from slimtune.core.examples import per_example
from slimtune.errors import DeltaError, RecipeError
from slimtune.privacy.draws import rekey
from slimtune.privacy.extra import opacus
from slimtune.privacy.ledger import Ledger, count_noise
from slimtune.privacy.losses import example_losses

STABLE = 0.01
"""gamma of automatic clipping (Bu et al., 2023, "Automatic Clipping", arXiv 2206.07136, equation 4)."""
LEAST, MOST = 1e-8, 1e8
"""Bounds of an adaptive clip."""


class PrivateStep:
    """The gradient of one step: `begin()`, `add(batch)` for each of its batches, `finish(step)`; then p.grad is set.

    secret: what the noise is made from (see draws.py).

    Errors: DeltaError when a trained tensor has no gradient for each example.
    """

    def __init__(self, delta: Delta, optimizer: torch.optim.Optimizer, ledger: Ledger, secret: Tensor) -> None:
        self.delta, self.ledger, self.secret = delta, ledger, secret
        self.named = dict(delta.named_parameters())
        self.optimizer = dp_optimizer(optimizer, ledger, self._generator())
        held = {id(p) for p in self.optimizer.params}
        if held != {id(p) for p in self.named.values()}:
            raise DeltaError("the optimizer does not hold exactly what the delta trains.",
                             "Make it from delta.parameters().")
        self.optimizer.attach_step_hook(lambda _: ledger.charge())
        self.begin()

    def _generator(self) -> torch.Generator:
        return torch.Generator(next(iter(self.named.values())).device)

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
        self.take(grads.collect(), len(losses))
        return losses.detach()

    def take(self, found: Mapping[str, Tensor], size: int) -> None:
        """Add the clipped gradients of `size` examples. Shapes: found: (size, *shape) by name of state."""
        for name, p in self.named.items():
            grad = found.get(name)
            if grad is None or grad.shape != (size, *p.shape):
                shape = None if grad is None else tuple(grad.shape)
                raise DeltaError(f"{name} has gradients of shape {shape} for {size} examples.",
                                 f"Each of them needs one, {(size, *p.shape)}. Is another delta active?")
            p.grad_sample = grad.reshape(size, p.numel())  # type: ignore[attr-defined]
        self.optimizer.signal_skip_step(True)
        self.optimizer.pre_step()
        for p in self.named.values():
            p.grad_sample = None  # type: ignore[attr-defined]

    def finish(self, step: int) -> None:
        """Add the noise of a step, charge the ledger, divide, and set the gradients; also for a step without examples.

        What the methods add to the loss by themselves (Delta.penalty) holds no data, and is added behind the noise.
        """
        for p in self.named.values():
            p.grad_sample = p.new_zeros(0, p.numel())  # type: ignore[attr-defined]
        rekey(self.optimizer.generator, self.secret, f"noise of step {step}")
        self.optimizer.signal_skip_step(False)
        self.optimizer.pre_step()
        extra = self.delta.penalty()
        if extra is not None:
            values = list(self.named.values())
            for p, grad in zip(values, torch.autograd.grad(extra, values, allow_unused=True), strict=True):
                if grad is not None:
                    p.grad += grad  # type: ignore[operator]

    @property
    def live(self) -> set[str]:
        """Names of state with a gradient of the step's examples, before noise; until the next `begin`."""
        return {name for name, p in self.named.items()
                if p.summed_grad is not None and bool(p.summed_grad.any())}  # type: ignore[attr-defined]

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


def dp_optimizer(optimizer: torch.optim.Optimizer, ledger: Ledger, generator: torch.Generator) -> Any:
    """Opacus' optimizer of a ledger's clipping. Shapes: p.grad_sample (B, p.numel()).

    Errors: RecipeError for an adaptive clip whose count is too noisy for sigma.
    """
    spec, count = ledger.spec, sum(len(group["params"]) for group in optimizer.param_groups)
    options: dict[str, Any] = {
        "noise_multiplier": ledger.sigma, "expected_batch_size": ledger.batch, "loss_reduction": "mean",
        "generator": generator, "secure_mode": spec.secure, "max_grad_norm": spec.clip}
    if spec.clipping == "per_layer":
        options["max_grad_norm"] = [spec.clip / math.sqrt(count)] * count
    if spec.clipping == "adaptive":
        noise = count_noise(spec, ledger.batch)
        if ledger.sigma >= 2 * noise:
            raise RecipeError(f"privacy.count_noise: {noise} must be above half of sigma, {ledger.sigma / 2:.3f}.",
                              "Raise it or privacy.batch_size.")
        options |= {"target_unclipped_quantile": spec.quantile, "clipbound_learning_rate": spec.clip_rate,
                    "max_clipbound": MOST, "min_clipbound": LEAST, "unclipped_num_std": noise}
    return _class(spec.clipping)(optimizer, **options)


def _class(clipping: str) -> Any:
    known = opacus("optimizers")
    if clipping in ("flat", "per_layer"):
        return known.get_optimizer_class(clipping, distributed=False)
    return _automatic(known.DPOptimizer) if clipping == "automatic" else _adaptive(known)


def _automatic(base: Any) -> Any:
    class AutomaticDPOptimizer(base):
        """Every gradient is scaled to a norm just below the clip; Opacus' own clipping then leaves it as it is."""

        def clip_and_accumulate(self) -> None:
            norms = torch.stack([g.norm(dim=1) for g in self.grad_samples]).norm(dim=0)
            for p in self.params:
                p.grad_sample = p.grad_sample * (self.max_grad_norm / (norms + STABLE))[:, None]
            super().clip_and_accumulate()

    return AutomaticDPOptimizer


def _adaptive(known: Any) -> Any:
    class AdaptiveDPOptimizer(known.AdaClipDPOptimizer):
        """Opacus', for steps of several batches or of none, and with the count of Andrew et al., 2021
        (arXiv 1905.03871, Algorithm 1): the sum of b_i - 1/2, which one example moves by 1/2, over the expected
        number of examples. Opacus sums b_i, which one example moves by 1, over the number drawn, which is private.
        """

        def clip_and_accumulate(self) -> None:
            self.unclipped_num = torch.as_tensor(self.unclipped_num)
            if len(self.grad_samples[0]):
                super().clip_and_accumulate()
            else:
                known.DPOptimizer.clip_and_accumulate(self)

        def update_max_grad_norm(self) -> None:
            share = 0.5 + (float(self.unclipped_num) - self.sample_size / 2) / self.expected_batch_size
            step = math.exp(-self.clipbound_learning_rate * (share - self.target_unclipped_quantile))
            self.max_grad_norm = min(max(self.max_grad_norm * step, self.min_clipbound), self.max_clipbound)

    return AdaptiveDPOptimizer
