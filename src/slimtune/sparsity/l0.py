"""L0: hard-concrete gates on the weights, trained to a sparsity with the weights frozen.

    min over log_alpha, max over l1 and l2:   E L(z * W) + l1 (s - t) + l2 (s - t)^2,    z ~ hard concrete(log_alpha)
    s = 1 - mean P(z != 0),    S = log_alpha

Source: Louizos, Welling, Kingma, 2018, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312;
of the Lagrangian, Wang, Wohlwend, Lei, 2020, "Structured Pruning of Large Language Models", arXiv 1910.04732, equation
3.
"""
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.lagrangian import Lagrangian
from slimtune.sparsity.view import View
from slimtune.sparsity.weight_gates import WeightGates


@criterion
class L0(Criterion):
    """The log_alpha of a gate on each weight, or block of weights, after `steps` steps on the data, taken in turn.

    sparsity: t, what the gates are trained to; that to which is pruned is best the same. ramp: share of the steps in
    which t rises to it. rows, columns: of a block as it is stored. Weights and gradients are left as they were.

    Errors: MethodError for a loss that is not finite; DeltaError for targets that are no matrices.
    """

    needs_data: ClassVar[bool] = True

    sparsity: float = Field(0.5, ge=0, lt=1, description="t")
    steps: int = Field(200, ge=1, description="steps of the gates")
    rate: float = Field(0.1, gt=0, description="learning rate of log_alpha")
    multiplier_rate: float = Field(0.1, gt=0, description="learning rate of l1 and l2")
    ramp: float = Field(0.3, ge=0, le=1, description="share of the steps in which t rises")
    start: float = Field(0.9, gt=0, lt=1, description="the gates' first value")
    rows: int = Field(1, ge=1)
    columns: int = Field(1, ge=1)

    def score(self, view: View) -> dict[str, Tensor]:
        data, paths = view.data("L0"), _paths(view)
        gates = WeightGates(view.model, list(paths.values()), rows=self.rows, columns=self.columns, start=self.start,
                            generator=_generator(view))
        holds = Lagrangian(self.sparsity, ramp=int(self.ramp * self.steps))
        optimizer, ascent = torch.optim.Adam(gates.log_alpha.values(), lr=self.rate), holds.ascent(self.multiplier_rate)
        with view.open(), gates.open():
            for step in range(self.steps):
                optimizer.zero_grad()
                ascent.zero_grad()
                with gates.sampled():
                    loss = view.loss(view.model, data[step % len(data)])
                    loss.backward()
                if not bool(loss.isfinite()):
                    raise MethodError(f"L0: the loss at step {step} is {loss.item()}.", "Lower rate or sparsity.")
                holds(1 - gates.penalty(), step).backward()
                optimizer.step()
                ascent.step()
        return {name: gates.spread(gates.log_alpha[path].detach()) for name, path in paths.items()}


def _generator(view: View) -> torch.Generator:
    device = next(iter(view.weights.values())).device
    return torch.Generator(device).manual_seed(view.generator("l0").initial_seed())


def _paths(view: View) -> dict[str, str]:
    """The parameter path of each target."""
    places = {id(p): path for path, p in view.model.named_parameters(remove_duplicate=False)}
    return {name: places[id(target.parameter)] for name, target in view.targets.items()}
