"""Augmented Lagrangian: train gates to a given sparsity.

    min over the model and the gates, max over l1 and l2:   L + l1 (s - t) + l2 (s - t)^2

s is the expected sparsity, t its target, which rises linearly from its start to its end. l1 and l2 begin at 0 and
climb their own gradients, so l2, whose gradient is a square, never falls.

Source: Z. Wang, J. Wohlwend, T. Lei, 2020, "Structured Pruning of Large Language Models", arXiv 1910.04732,
equation 3; M. Xia, Z. Zhong, D. Chen, 2022, "Structured Pruning Learns Compact and Accurate Models", arXiv 2204.00408.
"""
import torch
from torch import Tensor, nn

from slimtune.errors import RecipeError


class Lagrangian(nn.Module):
    """The penalty that holds an expected sparsity at its target.

    target: the sparsity at the end, start: at step 0, ramp: steps over which it rises.

    Example:
        >>> holds = Lagrangian(0.6, ramp=10)
        >>> holds.target_at(5), holds.target_at(50)
        (0.3, 0.6)
    """

    def __init__(self, target: float, *, start: float = 0.0, ramp: int = 0) -> None:
        super().__init__()
        if not 0 <= start <= target < 1 or ramp < 0:
            raise RecipeError(f"sparsity cannot go from {start} to {target} in {ramp} steps.",
                              "It rises, from 0 or more to less than 1.")
        self.target, self.start, self.ramp = target, start, ramp
        self.linear, self.square = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def target_at(self, step: int) -> float:
        """t, at a step counted from 0."""
        return self.start + (self.target - self.start) * (min(1.0, step / self.ramp) if self.ramp else 1.0)

    def forward(self, sparsity: Tensor, step: int) -> Tensor:
        """l1 (s - t) + l2 (s - t)^2, to be added to the loss."""
        gap = sparsity - self.target_at(step)
        return self.linear * gap + self.square * gap.square()

    def ascent(self, learning_rate: float = 0.01) -> torch.optim.Optimizer:
        """What l1 and l2 climb by; step it beside the model's own optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0, maximize=True)
