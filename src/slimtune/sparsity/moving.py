"""Weights that a criterion moves: they must be the delta's to train."""
import torch
from torch import Tensor

from slimtune.errors import MethodError
from slimtune.sparsity.target import Target, oriented
from slimtune.sparsity.view import View


def need_trained(view: View, who: str) -> None:
    """Errors: MethodError for a target that the delta does not train, for its values belong to the backbone."""
    own = view.delta.tensors()
    for name in view.targets:
        if name not in own or not own[name].requires_grad:
            raise MethodError(f"{who} moves the weights that stay, and delta '{view.delta.name}' does not train "
                              f"{name}.",
                              "Attach Full(), or another method that trains the backbone's own weights, and prune "
                              f"that delta; or use {who}(update=False), which only scores.")


@torch.no_grad()
def write(target: Target, weight: Tensor) -> None:
    """Set a target's values. Shapes: weight (d_out, d_in)."""
    target.parameter.copy_(oriented(weight, target))
