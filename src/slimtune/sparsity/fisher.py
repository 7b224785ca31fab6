"""Fisher: the second-order change of the loss without a weight, by the diagonal of the empirical Fisher matrix.

    S = 1/2 F W^2,    F = E (dl/dW)^2

On the coefficients of `Gates`, which are 1, it orders heads and neurons as sum (dL/dm)^2 does.

Source: Theis et al., 2018, "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787,
equations 5 to 8; for masks, Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv
2204.09656, section 4.2.
"""
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import Per, gradients
from slimtune.sparsity.view import View


@criterion
class Fisher(Criterion):
    """Half the squared weight times its mean squared gradient, of examples or of batches as they are given.

    The mean over batches is not that over examples: within a batch, gradients add up before they are squared.
    """

    needs_data: ClassVar[bool] = True

    per: Per = Field("example", description="what one gradient is of; batches cost less")

    def score(self, view: View) -> dict[str, Tensor]:
        weights, total, n = view.weights, dict[str, Tensor](), 0
        for found in gradients(view, "Fisher", self.per):
            total = {name: g.square() + total[name] if total else g.square() for name, g in found.items()}
            n += 1
        return {name: weights[name].square() * f / (2 * n) for name, f in total.items()}
