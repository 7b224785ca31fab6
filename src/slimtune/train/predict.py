"""predict and evaluate: a model's outputs on examples, in their order, the same in every process."""
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.modes import evaluating
from slimtune.data.examples import IGNORED, Collate
from slimtune.data.metrics import token_loss
from slimtune.errors import DataError, TrainError
from slimtune.train.state import kept_rng

Score = Callable[[Any, Any], Mapping[str, float]]
Step = Callable[[nn.Module, Mapping[str, Tensor], Any], tuple[Any, Any]]
"""(model, batch, the forward's output) -> (predictions, references) of the batch, an item an example."""


@dataclass(frozen=True)
class Predictions:
    """What `predict` returns. loss: the mean over examples or scored tokens; None without labels.

    Shapes:
        predictions: (N, classes), (N, T, classes), or what the step made: a list of texts ...
        references: the labels, padded with -100; None without labels.
    """

    predictions: Any
    references: Any
    loss: float | None


def logits(model: nn.Module, batch: Mapping[str, Tensor], output: Any) -> tuple[Tensor, Tensor | None]:
    """The logits in float32, and the labels: what classification, tagging and regression are scored by."""
    return output.logits.float(), batch.get("labels")


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], output: Any) -> tuple[Tensor, Tensor]:
    """The summed loss and the scored tokens of each text: what causal language models are scored by."""
    if "labels" not in batch:
        raise DataError("scoring texts token by token needs labels.", "Encode the data with labels.")
    return token_loss(output.logits, batch["labels"])


def generated(tokenizer: Any, max_new_tokens: int = 64, num_beams: int = 1, **options: Any) -> Step:
    """A step that writes text: what seq2seq models are scored by. References are the labels, decoded."""

    def step(model: nn.Module, batch: Mapping[str, Tensor], output: Any) -> tuple[list[str], list[str] | None]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams,  # type: ignore[operator]
                             do_sample=False, use_cache=True, **options)
        labels = batch.get("labels")
        if labels is not None:
            labels = labels.masked_fill(labels == IGNORED, tokenizer.pad_token_id)
            labels = tokenizer.batch_decode(labels, skip_special_tokens=True)
        return tokenizer.batch_decode(ids, skip_special_tokens=True), labels

    return step


def predict(model: nn.Module, data: Sequence[Mapping[str, Any]] | Any, collate: Collate, batch_size: int = 64, *,
            step: Step = logits, by_length: bool = False, precision: str = "float32") -> Predictions:
    """Run the model on every example, in eval mode and without gradients.

    The same model, data and batch size give the same bits in any process; the random generators and the
    model's mode are left as they were. `by_length` batches examples of like length, which pads less; results
    come in the order of the data all the same.

    Errors: DataError for no examples.
    """
    order = list(range(len(data)))
    if not order:
        raise DataError("there are no examples to predict on.")
    if by_length:
        order.sort(key=lambda i: len(data[i]["input_ids"]))
    given, expected, losses, weights = [], [], [], []
    with kept_rng(), evaluating(model), torch.no_grad(), autocast(model, precision):
        for start in range(0, len(order), batch_size):
            chunk = order[start:start + batch_size]
            together = getattr(data, "__getitems__", None)
            batch = on_device(collate(together(chunk) if together else [data[i] for i in chunk]), model)
            output = model(**batch)
            predictions, references = step(model, batch, output)
            given += _items(predictions)
            expected += _items(references) if references is not None else []
            weight = items(model, batch) if getattr(output, "loss", None) is not None else 0
            if weight:
                losses.append(float(output.loss))
                weights.append(weight)
    back = sorted(range(len(order)), key=order.__getitem__)
    loss = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights) if losses else None
    return Predictions(_joined([given[i] for i in back], 0.0),
                       _joined([expected[i] for i in back], IGNORED) if expected else None, loss)


def evaluate(model: nn.Module, data: Any, collate: Collate, metric_fn: Score | None, batch_size: int = 64, *,
             step: Step = logits, by_length: bool = False, precision: str = "float32") -> dict[str, float]:
    """{"loss": ..., and what metric_fn(predictions, references) names}.

    Errors: as `predict`; TrainError when a metric is called loss.
    """
    found = predict(model, data, collate, batch_size, step=step, by_length=by_length, precision=precision)
    scores = {} if found.loss is None else {"loss": found.loss}
    if metric_fn is not None:
        own = dict(metric_fn(found.predictions, found.references))
        if "loss" in own:
            raise TrainError("a metric is named 'loss', which is the name of the model's own loss.", "Rename it.")
        scores |= {name: float(value) for name, value in own.items()}
    return scores


def items(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """How many terms the model's mean loss of a batch has: examples, or scored tokens."""
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    if labels.is_floating_point():
        return labels.numel()
    shifted = labels.dim() > 1 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False) and (
        getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss")
    return int(((labels[..., 1:] if shifted else labels) != IGNORED).sum())


def autocast(model: nn.Module, precision: str) -> Any:
    """The context that computes in `precision`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=getattr(torch, precision))


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors where the model is; other columns as they are."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _items(values: Any) -> list[Any]:
    return list(values.detach().cpu()) if isinstance(values, Tensor) else list(values)


def _joined(values: list[Any], fill: float) -> Any:
    """One tensor, the shorter items padded along their first axis; a list of anything else as it is."""
    if not isinstance(values[0], Tensor):
        return values
    longest = max(value.shape[0] for value in values) if values[0].dim() else 0
    if any(value.dim() and value.shape[0] < longest for value in values):
        values = [torch.cat([value, value.new_full((longest - value.shape[0], *value.shape[1:]), fill)])
                  for value in values]
    return torch.stack(values)
