"""One loss an example, that depends on that example alone: its own term, or the mean over its own scored tokens.

    classes     L_i = -log softmax(z_i)[y_i]
    a number    L_i = mean over its outputs of (z_i - y_i)^2
    tags, texts L_i = 1/n_i sum over its n_i scored tokens t of -log softmax(z_it)[y_it]

A model's own loss of a batch is the mean over all tokens of all examples: there the weight of one example hangs on
the lengths of the others, and the clipped sum moves by more than clip when one is left out.
"""
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.errors import MethodError

IGNORED = -100


def example_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The losses of a batch with labels. Shapes: (B).

    Errors: MethodError for a model whose outputs and labels are none of these, as where examples are compared with
    each other.
    Example:
        >>> from slimtune.testing import batch, tiny
        >>> example_losses(tiny("gpt2"), batch("gpt2")).shape
        torch.Size([3])
    """
    labels = batch.get("labels")
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    inputs = batch if decodes else {key: value for key, value in batch.items() if key != "labels"}
    logits = getattr(model(**inputs), "logits", None)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.shape[0] != labels.shape[0]:
        raise _refused(model, "gives no logits for each example's labels")
    logits = logits.float() if logits.element_size() < 4 else logits
    if labels.is_floating_point():
        return _of_numbers(model, logits.flatten(1), labels.flatten(1) if labels.dim() > 1 else labels[:, None])
    if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1:
        return F.cross_entropy(logits, labels, reduction="none")
    if labels.dim() != 2 or logits.dim() != 3 or logits.shape[1] != labels.shape[1]:
        raise _refused(model, f"has logits of {tuple(logits.shape)} for labels of {tuple(labels.shape)}")
    if not decodes and getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)    # and not logits[:, :-1], which would be copied
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp_min(1)


def _of_numbers(model: Any, outputs: Tensor, labels: Tensor) -> Tensor:
    if outputs.shape != labels.shape:
        raise _refused(model, f"has {outputs.shape[1]} outputs for {labels.shape[1]} numbers")
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none").mean(1)
    return F.mse_loss(outputs, labels.to(outputs.dtype), reduction="none").mean(1)


def _refused(model: nn.Module, why: str) -> MethodError:
    return MethodError(f"{type(model).__name__} {why}, so no loss depends on one example alone.",
                       "Private training takes classification, regression, tagging, causal_lm and seq2seq.")
