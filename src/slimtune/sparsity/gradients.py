"""Gradients of the loss by the weights that may be pruned, on batches or on one example at a time."""
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from slimtune.core.examples import batch_size
from slimtune.errors import MethodError
from slimtune.sparsity.view import Batch, View

Per: TypeAlias = Literal["example", "batch"]


def singles(batch: Batch) -> Iterator[Batch]:
    """A batch as its examples, each a batch of one; what has no axis of examples stays as it is.

    Example:
        >>> [one["labels"].tolist() for one in singles({"labels": torch.tensor([3, 4])})]
        [[3], [4]]
    """
    size = batch_size((), batch)
    for i in range(size):
        yield {key: value[i:i + 1] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
               else value for key, value in batch.items()}


def parts(view: View, who: str, per: Per) -> Iterator[Batch]:
    """The data, a batch or an example at a time."""
    for batch in view.data(who):
        yield from singles(batch) if per == "example" else (batch,)


def gradients(view: View, who: str, per: Per) -> Iterator[dict[str, Tensor]]:
    """dL/dW of every target for each part of the data, in float32 or wider. Errors: MethodError if not finite."""
    for part in parts(view, who, per):
        found = {name: wide(g) for name, g in view.gradients(part).items()}
        finite(found, who)
        yield found


def summed(view: View, who: str) -> dict[str, Tensor]:
    """Sum over the batches of dL/dW, L being each batch's mean."""
    total: dict[str, Tensor] = {}
    for found in gradients(view, who, "batch"):
        total = {name: g + total[name] if total else g for name, g in found.items()}
    return total


def wide(tensor: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite(tensors: dict[str, Tensor], who: str) -> None:
    """Errors: MethodError for a gradient that is infinite or not a number."""
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise MethodError(f"{who}: a gradient of {name} is not finite.",
                              "Is the loss on the pruning data finite? Try a wider dtype than that of the weights: "
                              f"{value.dtype}.")
