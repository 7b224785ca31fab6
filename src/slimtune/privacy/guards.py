"""What would break the promise before the first step: modules that mix examples, losses that do, starts that read."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.bookkeeping import Rows
from slimtune.core.delta import Delta
from slimtune.core.examples import per_example
from slimtune.core.modes import evaluating
from slimtune.errors import MethodError, TrainError, listing
from slimtune.privacy.losses import example_losses

MIXING = (nn.modules.batchnorm._BatchNorm,)
"""Modules whose output for an example hangs on the others in training."""


def check_delta(delta: Delta) -> None:
    """Errors: MethodError for what cannot train privately; it names it."""
    mixing = [name for name, module in delta.model.named_modules() if isinstance(module, MIXING)]
    if mixing:
        raise MethodError(f"{listing(mixing, 4)}: batch norm mixes the examples of a batch, so no gradient is of one.",
                          "Private training needs a model with layer or group norm.")
    reading = [type(method).__name__ for method in delta.methods if method.needs_data]
    if reading:
        raise MethodError(f"{listing(reading)} starts from the training data, which no noise protects.",
                          "Choose an initialisation that reads none.")
    narrow = [name for name, p in delta.named_parameters() if p.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise MethodError(f"{listing(narrow, 4)}: trained in half precision, where noise and clipping are not exact.",
                          "Load the model in float32; train.precision=bfloat16 may still compute in half.")


def probe(delta: Delta, batch: Mapping[str, Any]) -> None:
    """On a batch of two examples or more, in the model's mode: an example replaced must not move another's gradient.

    The random numbers are the caller's to keep. Errors: MethodError when the loss couples examples, or is not the
    model's own; TrainError for a loss that is not finite.
    """
    size = len(batch["labels"])
    if size < 2:
        return
    swapped = torch.tensor([1, *range(1, size)])
    other = {key: value[swapped.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
             for key, value in batch.items()}
    with torch.random.fork_rng():
        one = _gradients(delta, batch)
    two = _gradients(delta, other)  # with the same dropout
    for name in one:
        gap, scale = _moved(one[name], two[name])
        if not gap <= 1e-3 * max(scale, 1e-6):
            raise MethodError(f"the gradient of one example moves by {gap:.2g} of {scale:.2g} when another is replaced "
                              f"({name}).", f"{type(delta.model).__name__} compares or mixes the examples of a batch, "
                              "and has no private training.")
    _own_loss(delta, batch)


def _moved(one: Rows, two: Rows) -> tuple[float, float]:
    """Of all examples but the first: the largest difference, and the largest number. One example's at a time."""
    gap = scale = 0.0
    for row in torch.eye(one.size)[1:]:
        mine = one.sum(row)
        gap, scale = max(gap, float((mine - two.sum(row)).abs().max())), max(scale, float(mine.abs().max()))
    return gap, scale


def _gradients(delta: Delta, batch: Mapping[str, Any]) -> dict[str, Rows]:
    with per_example(delta.model) as grads:
        losses = example_losses(delta.model, batch)
        if not bool(losses.isfinite().all()):
            bad = float(losses.detach()[~losses.isfinite()][0])
            raise TrainError(f"the loss of an example is {bad} before any training.",
                             "Look for damaged inputs or labels.")
        losses.sum().backward()
    return grads.take()


@torch.no_grad()
def _own_loss(delta: Delta, batch: Mapping[str, Any]) -> None:
    """Of one example alone, ours must be the model's own loss."""
    model, size = delta.model, len(batch["labels"])
    with evaluating(model):
        alone = {key: value[:1] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
                 for key, value in batch.items()}
        own, ours = getattr(model(**alone), "loss", None), example_losses(model, alone)[0]
    if own is not None and bool(own.isfinite()) and abs(float(own) - float(ours)) > 1e-2 * max(abs(float(own)), 1e-2):
        raise MethodError(f"{type(model).__name__} has loss {float(own):.4g} for an example whose labels say "
                          f"{float(ours):.4g}.", "Private training takes cross-entropy and squared error, each "
                          "example's own mean; a model that adds more to its loss is not trained privately.")
