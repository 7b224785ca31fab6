"""Opacus' optimizers over gradients of examples that are kept as norms and sums take them (core/bookkeeping.py).

Opacus reads `p.grad_sample`, (B, *shape). Here each batch hands over Rows, and the norms, the factors and the clipped
sum are taken from those; noise, division, the count of batches and the step are Opacus'.

    f_i = min(1, C / |g_i|)                      flat and adaptive, the norm over all tensors
    f_il = min(1, C_l / |g_il|)                  per_layer, the norm of each
    f_i = C / (|g_i| + 0.01)                     automatic
"""
import math
from typing import Any

import torch
from torch import Tensor

from slimtune.core.bookkeeping import Grams, Rows
from slimtune.errors import RecipeError
from slimtune.privacy.extra import opacus
from slimtune.privacy.ledger import Ledger, count_noise

STABLE = 0.01
"""gamma of automatic clipping (Bu et al., 2023, "Automatic Clipping", arXiv 2206.07136, equation 4)."""
SMALL = 1e-6
"""What Opacus adds to a norm before it divides by it."""
LEAST, MOST = 1e-8, 1e8
"""Bounds of an adaptive clip."""
PIECE = 1 << 16
"""Numbers of noise that are drawn at once: they stay in the cache."""


def dp_optimizer(optimizer: torch.optim.Optimizer, ledger: Ledger, generator: torch.Generator) -> Any:
    """Opacus' optimizer of a ledger's clipping; `rows` takes the gradients of a batch, in the order of `params`.

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
    return _CLASSES[spec.clipping]()(optimizer, **options)


def _flat(base: Any = None) -> Any:
    known = base or opacus("optimizers").DPOptimizer

    class RowsDPOptimizer(known):
        """Takes `rows`, a list of Rows that is emptied, in place of p.grad_sample."""

        rows: list[Rows]

        def add_noise(self) -> None:
            """Opacus' noise, added in place and in pieces that stay in the cache: a sum is not held beside its grad."""
            draw = opacus("optimizers.optimizer")._generate_noise
            for p in self.params:
                for piece in p.summed_grad.view(-1).split(PIECE):
                    piece += draw(std=self.deviation * self.max_grad_norm, reference=piece, generator=self.generator,
                                  secure_mode=self.secure_mode)
                p.grad, p.summed_grad = p.summed_grad, None

        @property
        def deviation(self) -> float:
            """The noise's, over the clip."""
            return self.noise_multiplier

        def clip_and_accumulate(self) -> None:
            found, self.rows = getattr(self, "rows", []), []
            factors = self.factors(_norms(found)).unbind(1) if found else ()
            for i, p in enumerate(self.params):
                if found:
                    p.summed_grad = found[i].sum(factors[i], p.summed_grad)
                    found[i].uses.clear()
                elif p.summed_grad is None:
                    p.summed_grad = torch.zeros_like(p)

        def factors(self, norms: Tensor) -> Tensor:
            """Shapes: norms (B, n) of n tensors; (B, n)."""
            return (self.max_grad_norm / (norms.norm(dim=1, keepdim=True) + SMALL)).clamp(max=1).expand_as(norms)

    return RowsDPOptimizer


def _per_layer() -> Any:
    class PerLayerDPOptimizer(_flat(opacus("optimizers").DPPerLayerOptimizer)):
        def factors(self, norms: Tensor) -> Tensor:
            return (norms.new_tensor(self.max_grad_norms) / (norms + SMALL)).clamp(max=1)

    return PerLayerDPOptimizer


def _automatic() -> Any:
    class AutomaticDPOptimizer(_flat()):
        """Every gradient is scaled to a norm just below the clip; what Opacus clips is then left as it is."""

        def factors(self, norms: Tensor) -> Tensor:
            whole = norms.norm(dim=1, keepdim=True)
            scale = self.max_grad_norm / (whole + STABLE)
            return (scale * (self.max_grad_norm / (scale * whole + SMALL)).clamp(max=1)).expand_as(norms)

    return AutomaticDPOptimizer


def _adaptive() -> Any:
    class AdaptiveDPOptimizer(_flat(opacus("optimizers").AdaClipDPOptimizer)):
        """Opacus', for steps of several batches or of none, and with the count of Andrew et al., 2021
        (arXiv 1905.03871, Algorithm 1): the sum of b_i - 1/2, which one example moves by 1/2, over the expected
        number of examples. Opacus sums b_i, which one example moves by 1, over the number drawn, which is private.
        """

        def factors(self, norms: Tensor) -> Tensor:
            found = super().factors(norms)
            self.sample_size += len(found)
            self.unclipped_num = self.unclipped_num + (found[:, 0] >= 1).sum()
            return found

        def add_noise(self) -> None:
            super().add_noise()
            noise = torch.normal(0.0, self.unclipped_num_std, (), generator=self.generator,
                                 device=self.generator.device)
            self.unclipped_num = float(self.unclipped_num) + float(noise)

        @property
        def deviation(self) -> float:
            """Of the gradient's noise, where the count takes its share of sigma (Theorem 1)."""
            sigma = self.noise_multiplier
            return (sigma ** -2 - (2 * self.unclipped_num_std) ** -2) ** -0.5 if sigma > 0 else 0.0

        def update_max_grad_norm(self) -> None:
            share = 0.5 + (float(self.unclipped_num) - self.sample_size / 2) / self.expected_batch_size
            step = math.exp(-self.clipbound_learning_rate * (share - self.target_unclipped_quantile))
            self.max_grad_norm = min(max(self.max_grad_norm * step, self.min_clipbound), self.max_clipbound)

    return AdaptiveDPOptimizer


def agreed(secret: Tensor, group: Any, device: torch.device) -> Tensor:
    """The secret of the group's first process, in all of them."""
    shared = secret.to(device)
    torch.distributed.broadcast(shared, group=group, group_src=0)
    return shared.to(secret.device)


def join(optimizer: Any, group: Any) -> None:
    """Make the clipped sums, and what an adaptive clip counts, those of all processes."""
    for p in optimizer.params:
        if p.summed_grad is None:
            p.summed_grad = torch.zeros_like(p)
        torch.distributed.all_reduce(p.summed_grad, group=group)
    if hasattr(optimizer, "unclipped_num"):
        counts = torch.tensor([float(optimizer.sample_size), float(optimizer.unclipped_num)], dtype=torch.float64,
                              device=optimizer.generator.device)
        torch.distributed.all_reduce(counts, group=group)
        optimizer.sample_size, optimizer.unclipped_num = counts.tolist()


_CLASSES = {"flat": _flat, "per_layer": _per_layer, "automatic": _automatic, "adaptive": _adaptive}


def _norms(rows: list[Rows]) -> Tensor:
    """Shapes: (B, n)."""
    grams: Grams = {}
    return torch.stack([one.norms(grams) for one in rows], 1)
