"""Channels: how much each output channel of a linear map matters, by the features that it gives on data.

    features_l1    S_i = E |a_i|            a = W x + b, a layer's own output, as the model uses it
    features_l2    S_i = sqrt(E a_i^2)
    saliency       S_i = E |a_i dl/da_i|

E is the mean over the tokens of all examples, padding left out; l is the loss of an example.

Source: Chen et al., 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", arXiv 2202.04736,
section 3.2; of the saliency, Molchanov et al., 2017, arXiv 1611.06440, equation 7. Chen's code reads the first layer's
features for all layers, and takes examples for channels: here each layer is scored by its own.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from slimtune.core.examples import batch_size
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.calibration import real_tokens
from slimtune.sparsity.gradients import finite, wide
from slimtune.sparsity.view import Batch, View

Features: TypeAlias = Literal["features_l1", "features_l2", "saliency"]
Take = Callable[[str, Tensor], None]


def channel_scores(view: View, by: Features) -> dict[str, Tensor]:
    """The score of each output channel of each target.

    Shapes: result (d_out,). Errors: MethodError for another name, without data, for a target that is no linear map of
    the backbone, and for features that are not finite.

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import BitFit
        >>> from slimtune.sparsity.target import targets
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), BitFit())
        >>> scores = channel_scores(View(delta, targets(delta, "base"), [batch("bert")]), "features_l1")
        >>> scores["own.bert.encoder.layer.0.intermediate.dense.weight"].shape
        torch.Size([64])
    """
    if by not in get_args(Features):
        raise MethodError(f"no score of channels is named '{by}'.", f"There are: {listing(get_args(Features))}",
                          suggest(by, get_args(Features)))
    total: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(name: str, values: Tensor) -> None:
        own = values.square().sum(0) if by == "features_l2" else values.abs().sum(0)
        total[name] = own + total[name] if name in total else own
        counts[name] = counts.get(name, 0) + values.shape[0]

    who = f"refill by {by}"
    for batch in view.data(who):
        with view.open() as parameters, _features(view, batch, take, by == "saliency"):
            if by == "saliency":
                torch.autograd.grad(view.loss(view.model, batch), list(parameters.values()), allow_unused=True)
            else:
                with torch.no_grad():
                    view.model(**batch)
    if lost := [name for name in view.targets if name not in total]:
        raise MethodError(f"{who}: the model does not run {lost[0]}, or its loss does not depend on it.",
                          "Leave it out of sites.")
    finite(total, who)
    means = {name: total[name] / counts[name] for name in view.targets}
    return {name: mean.sqrt() if by == "features_l2" else mean for name, mean in means.items()}


@contextmanager
def _features(view: View, batch: Batch, take: Take, gradients: bool) -> Iterator[None]:
    """Call take(name, a) with what each target gives, or take(name, a dl/da); values (tokens, d_out)."""
    size = batch_size((), batch)

    def reader(name: str, mask: Tensor | None) -> Callable[..., None]:
        def real(values: Tensor) -> None:
            values = wide(values.reshape(-1, values.shape[-1]))
            take(name, values[mask.to(values.device)] if mask is not None and mask.numel() == len(values) else values)

        def read(module: nn.Module, args: Any, output: Tensor) -> None:
            if not gradients:
                real(output.detach())
            else:
                a = output.detach().clone()  # the model may go on in place
                output.register_hook(lambda g: real(a * g * size))  # the loss is a mean over the batch
        return read

    with ExitStack() as stack:
        for name, target in view.targets.items():
            if target.module is None:
                raise MethodError(f"{name} is no linear map of the backbone, whose outputs could be read.",
                                  "Prune with on='base', or refill by magnitude or remain.")
            module = view.model.get_submodule(target.module)
            handle = module.register_forward_hook(reader(name, real_tokens(view, target, batch)))
            stack.callback(handle.remove)
        yield
