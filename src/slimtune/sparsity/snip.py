"""SNIP: how much the loss would feel that a weight is gone.

    S = |W * g| / sum |W * g|,    g = sum over the batches of dL/dW

This is |dL/dm| of a mask W <- m * W at m = 1. The gradients are summed before the absolute value is taken, and the sum
in the denominator goes over all targets.

Source: Lee et al., 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv 1810.02340,
equations 4 to 6; on adapters, He et al., 2022, "SparseAdapter", arXiv 2210.04284, section 3.
"""
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import summed
from slimtune.sparsity.view import View


@criterion
class SNIP(Criterion):
    """The weight times its gradient, in size; all scores together sum to 1.

    Errors: MethodError when every score is 0, as for LoRA before its first step: B is 0, so A has no gradient.

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import Pfeiffer
        >>> from slimtune.sparsity.target import targets
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), Pfeiffer(bottleneck=4))
        >>> scores = SNIP().score(View(delta, targets(delta), [batch("bert")]))
        >>> round(float(sum(s.sum() for s in scores.values())), 4)
        1.0
    """

    needs_data: ClassVar[bool] = True

    def score(self, view: View) -> dict[str, Tensor]:
        weights = view.weights
        raw = {name: (weights[name] * g).abs() for name, g in summed(view, "SNIP").items()}
        total = torch.stack([s.sum().cpu() for s in raw.values()]).sum()
        if not total > 0:
            raise MethodError("SNIP: every weight times its gradient is 0, so none is better than another.",
                              "A LoRA has just been attached? Its B is 0 and A gets no gradient. Train a few steps "
                              "first, or take 'magnitude' or 'random'.")
        return {name: s / total.to(s.device) for name, s in raw.items()}
