"""Random: the control that every other criterion has to beat.

    S ~ U(0, 1)

Source: Liu et al., 2022, "The Unreasonable Effectiveness of Random Pruning", arXiv 2202.02643, section 3.
"""
import torch
from torch import Tensor

from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.view import View


@criterion
class Random(Criterion):
    """Uniform noise, the same for the same seed and name, whatever else is pruned."""

    def score(self, view: View) -> dict[str, Tensor]:
        return {name: torch.rand(weight.shape, generator=view.generator(name)).to(weight.device)
                for name, weight in view.weights.items()}
