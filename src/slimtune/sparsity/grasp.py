"""GraSP: keep what keeps the gradient flowing.

    g = dL/dW,    S = W * (H g),    H the Hessian of L

Without a weight, W -> 0, |g|^2 changes by -2 W (H g) to first order. The paper scores -W * (H g) and removes the
largest; here the sign is the other, so that as with every criterion the smallest are removed: a score below 0 is of a
weight without which the gradient grows. Summed over all weights, S is W^T H g.

With several batches, g and H are sums over them: one pass for g, one for H g = d(g^T dL/dW)/dW with the first g held.

Source: Wang, Zhang, Grosse, 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", arXiv
2002.07376, equation 8 and algorithm 1; on adapters, He et al., 2022, "SparseAdapter", arXiv 2210.04284, section 3.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import finite, summed, wide
from slimtune.sparsity.view import View


@criterion
class GraSP(Criterion):
    """The weight times the Hessian's product with the gradient, signed.

    compat="official": as SparseAdapter's code, which declares a temperature and does not use it, and divides by the
    size of the scores' sum; the order of the scores at temperature 1 is the same.

    Errors: MethodError when the model's head, whose logits are smoothed, cannot be told.
    """

    needs_data: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    temperature: float = Field(200.0, gt=0, description="logits are divided by it")
    compat: Literal["paper", "official"] = "paper"

    def score(self, view: View) -> dict[str, Tensor]:
        temperature = self.temperature if self.compat == "paper" else 1.0
        with smoothed(view, temperature), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            first = summed(view, "GraSP")
            product = hessian_product(view, first)
        weights = view.weights
        scores = {name: weights[name] * hg for name, hg in product.items()}
        if self.compat == "paper":
            return scores
        size = torch.stack([s.sum().cpu() for s in scores.values()]).sum().abs() + 1e-10
        return {name: s / size.to(s.device) for name, s in scores.items()}


def hessian_product(view: View, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """H v by name, H being the Hessian of the sum of the batches' losses by all targets together."""
    total = {name: torch.zeros_like(v) for name, v in vector.items()}
    for batch in view.data("GraSP"):
        with view.open() as parameters, torch.enable_grad():
            loss = view.loss(view.model, batch)
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            along = [(wide(g) * vector[name]).sum() for name, g in zip(parameters, found, strict=True)
                     if g is not None and g.requires_grad]
            if not along:  # the loss is linear in the weights
                continue
            second = torch.autograd.grad(torch.stack(along).sum(), list(parameters.values()), allow_unused=True)
        for name, hv in zip(parameters, second, strict=True):
            if hv is not None:
                total[name] += wide(hv)
    finite(total, "GraSP")
    return total


@contextmanager
def smoothed(view: View, temperature: float) -> Iterator[None]:
    """Divide the head's output by a temperature, while it is open."""
    if temperature == 1:
        yield
        return

    def divide(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            raise MethodError(f"GraSP: the head {type(module).__name__} gives no tensor to divide by a temperature.",
                              "Set temperature=1.")
        return out / temperature

    handle = _head(view).register_forward_hook(divide)
    try:
        yield
    finally:
        handle.remove()


def _head(view: View) -> nn.Module:
    embeddings = getattr(view.model, "get_output_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        return embeddings
    if not view.delta.anatomy.heads:
        raise MethodError(f"GraSP: {type(view.model).__name__} has no head whose logits could be divided by a "
                          "temperature.", "Set temperature=1.")
    return view.model.get_submodule(view.delta.anatomy.heads[-1])
