"""How each task is scored and its predictions are told: (metric function, step), and lines for people."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.data import DataSpec, metrics
from slimtune.data.metrics import Score, tag_names
from slimtune.data.spec import MULTI_LABEL
from slimtune.train import Predictions, generated, logits, token_losses
from slimtune.train.predict import Step

Told = dict[str, Any]


def scoring(spec: DataSpec, labels: Sequence[str], tokenizer: Any) -> tuple[Score, Step]:
    """The metrics of a task, and the step that makes the predictions they read."""
    score = metrics(spec.task)
    if spec.task == "token_classification":
        return lambda guess, truth: score(*tag_names(guess, truth, labels)), logits
    if spec.task == "causal_lm":
        return score, token_losses
    if spec.task == "seq2seq":
        return score, generated(tokenizer, max_new_tokens=spec.max_target_length or spec.max_length)
    return score, logits


def tell(spec: DataSpec, labels: Sequence[str], found: Predictions, words: Sequence[Any] = ()) -> Iterator[Told]:
    """Predictions as one plain mapping an example, in order.

    classification: {label, scores}, scores are probabilities. image_classification: the same behind {image}.
    multi_label_image_classification: {image, labels, scores}, the labels of a probability above 0.5.
    regression: {score}. token_classification: {words, tags}; a word that was cut off has the tag None. causal_lm:
    {token_loss, perplexity, tokens}, in nats a token. seq2seq: {text}. words: for token_classification, (words, the
    word of each token) of each example; for images, their names.

    Example:
        >>> spec = DataSpec(task="classification", test="x.csv")
        >>> next(tell(spec, ("no", "yes"), Predictions(torch.tensor([[0.0, 0.0]]), None, None)))
        {'label': 'no', 'scores': {'no': 0.5, 'yes': 0.5}}
    """
    values = found.predictions
    if spec.task == "classification":
        for row in values.softmax(-1):
            yield {"label": labels[int(row.argmax())], "scores": dict(zip(labels, row.tolist(), strict=True))}
    elif spec.task == "image_classification":
        for name, row in zip(words, values.softmax(-1), strict=True):
            yield {"image": name, "label": labels[int(row.argmax())],
                   "scores": dict(zip(labels, row.tolist(), strict=True))}
    elif spec.task == MULTI_LABEL:
        for name, row in zip(words, values.sigmoid().tolist(), strict=True):
            yield {"image": name, "labels": [label for label, score in zip(labels, row, strict=True) if score > 0.5],
                   "scores": dict(zip(labels, row, strict=True))}
    elif spec.task == "regression":
        yield from ({"score": float(row)} for row in values.reshape(len(values)))
    elif spec.task == "token_classification":
        for row, (text, ids) in zip(values.argmax(-1), words, strict=True):
            yield {"words": list(text), "tags": _tags(row, ids, labels, len(text))}
    elif spec.task == "causal_lm":
        for loss, tokens in zip(values.tolist(), found.references.tolist(), strict=True):
            mean = loss / max(tokens, 1)
            yield {"token_loss": mean, "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()),
                   "tokens": int(tokens)}
    else:
        yield from ({"text": text} for text in values)


def _tags(row: Tensor, ids: Sequence[int | None], labels: Sequence[str], size: int) -> list[str | None]:
    """A word's tag is that of its first token."""
    tags: list[str | None] = [None] * size
    before = None
    for position, word in enumerate(ids):
        if word is not None and word != before:
            tags[word] = labels[int(row[position])]
        before = word
    return tags


def scores_of(found: Predictions, score: Score) -> dict[str, float]:
    """The loss and the metrics of predictions with references."""
    loss = {} if found.loss is None else {"loss": found.loss}
    return loss | dict(score(found.predictions, found.references))


def finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as JSON has them: what is not finite, such as a perplexity out of range, is null."""
    return {name: value if abs(value) < float("inf") else None for name, value in scores.items()}
