"""Wanda: a weight counts as much as it adds to its output, on real inputs.

    S_ij = |W_ij| ||X_j||_2

X_j holds input j of every token of the data, padding left out. The paper compares within each row of W: scores of
different outputs are not on one scale. Its code divides by the number of sequences, which changes no mask. It goes
through the model layer by layer, each seeing what the pruned ones below give; here, block by block:

    for block in range(12):
        prune(delta, 0.5, "wanda", on="base", allocation="row", blocks=(block,), batches=batches)

Source: Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
equation 1.
"""
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.sparsity.calibration import calibrate
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import wide
from slimtune.sparsity.target import oriented
from slimtune.sparsity.view import View


@criterion
class Wanda(Criterion):
    """The weight's size times the l2 norm of its input.

    allocation: how the paper compares scores. Errors: MethodError for targets that are no linear map of the backbone.

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import BitFit
        >>> from slimtune.sparsity.target import targets
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), BitFit())
        >>> scores = Wanda().score(View(delta, targets(delta, "base"), [batch("bert")]))
        >>> scores["own.bert.encoder.layer.0.output.dense.weight"].shape
        torch.Size([32, 64])
    """

    needs_data: ClassVar[bool] = True
    allocation: ClassVar[str] = "row"

    def score(self, view: View) -> dict[str, Tensor]:
        squares: dict[str, Tensor] = {}

        def take(name: str, x: Tensor) -> None:
            own = wide(x).square().sum(0)
            squares[name] = own + squares[name] if name in squares else own

        calibrate(view, "Wanda", take)
        weights = view.weights
        return {name: oriented(oriented(wide(weights[name]).abs(), target) * torch.sqrt(squares[name]), target)
                for name, target in view.targets.items()}
