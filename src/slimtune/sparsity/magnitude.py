"""Magnitude: small weights matter least.

    S = |W|

Source: Han et al., 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626,
section 3.1.
"""
from torch import Tensor

from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.view import View


@criterion
class Magnitude(Criterion):
    """|W|, of each weight.

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.sparsity.target import targets
        >>> from slimtune.testing import tiny
        >>> delta = attach(tiny("bert"), LoRA(rank=2))
        >>> scores = Magnitude().score(View(delta, targets(delta, "base")))
        >>> len(scores)
        12
    """

    def score(self, view: View) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in view.weights.items()}
