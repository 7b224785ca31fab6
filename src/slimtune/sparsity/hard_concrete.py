"""The hard-concrete distribution: gates in [0, 1] that are exactly 0 or 1 with a probability of their own.

    u ~ U(0, 1);   s = sigmoid((log(u / (1 - u)) + log_alpha) / beta);   z = clip(s (zeta - gamma) + gamma, 0, 1)
    P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta))
    at evaluation:  z = clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1),   without beta

Source: C. Louizos, M. Welling, D. Kingma, 2018, "Learning Sparse Neural Networks through L0 Regularization",
arXiv 1712.01312, equations 10 to 13.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.errors import RecipeError


@dataclass(frozen=True)
class HardConcrete:
    """The distribution's constants; `log_alpha` is the only thing that is learned.

    Shapes:
        log_alpha, and all that is returned: any, [...].

    Example:
        >>> law = HardConcrete()
        >>> round(float(law.alive(torch.tensor(0.0))), 6), float(law.gate(torch.tensor(0.0)))
        (0.831822, 0.5)
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        if not (self.gamma < 0 and self.zeta > 1 and self.beta > 0):
            raise RecipeError(f"{self}: gates need gamma < 0, zeta > 1 and beta > 0.")

    @property
    def shift(self) -> float:
        """-beta log(-gamma / zeta): how far P(z != 0) is ahead of sigmoid(log_alpha)."""
        return -self.beta * math.log(-self.gamma / self.zeta)

    def sample(self, log_alpha: Tensor, generator: torch.Generator | None = None, margin: float = 1e-4) -> Tensor:
        """A draw of every gate, with a gradient by log_alpha. margin: how far u stays from 0 and 1."""
        drawn = torch.rand(log_alpha.shape, generator=generator, dtype=log_alpha.dtype, device=log_alpha.device)
        return self.stretch((log_alpha + drawn.clamp_(margin, 1 - margin).logit_()) / self.beta)

    def gate(self, log_alpha: Tensor) -> Tensor:
        """The gate at evaluation; exactly 0 if, and only if, log_alpha <= log(-gamma / zeta)."""
        return self.stretch(log_alpha)

    def stretch(self, logit: Tensor) -> Tensor:
        """clip(sigmoid(logit) (zeta - gamma) + gamma, 0, 1)"""
        return (logit.sigmoid() * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def alive(self, log_alpha: Tensor) -> Tensor:
        """P(z != 0); its mean is the L0 regulariser."""
        return (log_alpha + self.shift).sigmoid()

    def start(self, gate: float) -> float:
        """The log_alpha whose gate at evaluation is this, in (0, 1).

        Example:
            >>> round(HardConcrete().start(0.9), 6)
            1.609438
        """
        if not 0 < gate < 1:
            raise RecipeError(f"gates cannot start at {gate}.", "Choose a number between 0 and 1.")
        share = (gate - self.gamma) / (self.zeta - self.gamma)
        return math.log(share / (1 - share))
