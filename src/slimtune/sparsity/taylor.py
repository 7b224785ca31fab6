"""Taylor: the first-order change of the loss without a weight, taken for each example.

    S = E |W * dL/dW|

Unlike SNIP's, the absolute value comes before the mean, so that examples which pull in opposite directions do not
cancel. On the coefficients of `Gates`, which are 1, it is the importance of heads and neurons:

    I_h = E |dL/dc_h| = E |A_h^T dL/dA_h|,    A_h the output of head h

Source: Molchanov et al., 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv
1611.06440, equation 7; for heads, Michel, Levy, Neubig, 2019, "Are Sixteen Heads Really Better than One?", arXiv
1905.10650, section 4.1.
"""
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import Per, gradients
from slimtune.sparsity.view import View


@criterion
class Taylor(Criterion):
    """The mean size of a weight times its gradient, over examples or over batches as they are given.

    normalize: divide the scores of each tensor, and so of each layer, by their l2 norm, as Michel et al. do for heads.
    """

    needs_data: ClassVar[bool] = True

    per: Per = Field("example", description="what one gradient is of; batches cost less")
    normalize: bool = Field(False, description="divide by each tensor's l2 norm")

    def score(self, view: View) -> dict[str, Tensor]:
        weights, total, n = view.weights, dict[str, Tensor](), 0
        for found in gradients(view, "Taylor", self.per):
            sizes = {name: (weights[name] * g).abs() for name, g in found.items()}
            total = {name: s + total[name] if total else s for name, s in sizes.items()}
            n += 1
        if self.normalize:
            return {name: s / s.norm().clamp(min=torch.finfo(s.dtype).tiny) for name, s in total.items()}
        return {name: s / n for name, s in total.items()}
