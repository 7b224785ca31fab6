"""Metrics: predictions and references -> named numbers, by scikit-learn, scipy, sacrebleu and rouge-score."""
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.data.entities import entities, is_bio
from slimtune.data.examples import IGNORED
from slimtune.errors import DataError, ExtraError, TrainError, listing, suggest

log = logging.getLogger("slimtune")
Score = Callable[[Any, Any], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """What a figure's name means: its range, and whether more is better."""

    unit: str
    higher: bool = True


METRICS = {
    "accuracy": Metric("0 to 1"), "macro_f1": Metric("0 to 1"), "matthews": Metric("-1 to 1"),
    "class_accuracy": Metric("0 to 1"), "roc_auc": Metric("0 to 1"), "map_11": Metric("0 to 1"),
    "map": Metric("0 to 1"),
    "pearson": Metric("-1 to 1"), "spearman": Metric("-1 to 1"),
    "mse": Metric("square of the label's unit", False),
    "token_f1": Metric("0 to 1"), "entity_f1": Metric("0 to 1"),
    "bleu": Metric("0 to 100"), "chrf": Metric("0 to 100"), "rougeL": Metric("0 to 100"),
    "perplexity": Metric("1 to infinity", False), "token_loss": Metric("nats a token", False),
}
PRIMARY = {"classification": "macro_f1", "regression": "spearman", "token_classification": "token_f1",
           "seq2seq": "bleu", "causal_lm": "perplexity", "image_classification": "accuracy",
           "multi_label_image_classification": "map_11"}
"""The figure by which the best checkpoint of a task is chosen."""


def metrics(task: str) -> Score:
    """The function (predictions, references) -> {metric: value} of a task; units are in `METRICS`.

    classification: class ids [N], or scores [N, C] -> accuracy, macro_f1, and matthews for two classes.
    image_classification: as classification -> accuracy, class_accuracy (the mean over the classes that occur),
        macro_f1, and for scores of two classes, where both occur, roc_auc.
    multi_label_image_classification: scores [N, C] and 0 or 1 for each label [N, C] -> map_11, VOC 2007's mean over the
        labels that occur of the precision at recall 0, 0.1 ... 1, at each the highest at that recall or more; map, with
        the area under the curve in place of the 11 points; macro_f1 of what scores above 0.
    regression: numbers [N] or [N, 1] -> pearson, spearman, mse. A constant has correlation 0 here.
    token_classification: tag names, a list for each sentence -> accuracy, token_f1 (micro, over what is
        not O), and entity_f1 (spans of the same type and bounds) where all tags are BIO. See `tag_names`.
    seq2seq: texts; references are texts, or lists of them -> bleu, chrf, rougeL (best reference, mean).
    causal_lm: summed loss [N] in nats and scored tokens [N] of each example -> token_loss, perplexity.

    Errors: DataError for lengths that differ or are 0, TrainError for predictions that are not finite.

    Example:
        >>> metrics("classification")([0, 1, 1, 1], [0, 1, 0, 1])["accuracy"]
        0.75
    """
    if task not in _SCORES:
        raise DataError(f"no metrics for task '{task}'.", f"There are for: {listing(_SCORES)}",
                        suggest(task, _SCORES))
    score = _SCORES[task]

    def checked(predictions: Any, references: Any) -> dict[str, float]:
        if len(predictions) != len(references) or not len(references):
            raise DataError(f"metrics of {task}: {len(predictions)} predictions for "
                            f"{len(references)} references.")
        return {name: float(value) for name, value in score(predictions, references).items()}

    return checked


def _array(values: Any) -> Any:
    import numpy as np

    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise TrainError("predictions hold NaN or infinite values; there is nothing to score.",
                         "The model's weights or its inputs are damaged, or the learning rate was too high.")
    return array


def _classification(predictions: Any, references: Any) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    scores, truth = _array(predictions), _array(references)
    guess = scores.argmax(-1) if scores.ndim == 2 else scores
    result = {"accuracy": accuracy_score(truth, guess),
              "macro_f1": f1_score(truth, guess, average="macro", zero_division=0)}  # type: ignore[arg-type]
    seen = len({*truth.tolist(), *guess.tolist()})
    if (scores.shape[1] if scores.ndim == 2 else seen) <= 2:
        result["matthews"] = matthews_corrcoef(truth, guess) if seen == 2 else 0.0
    return result


def _image_classification(predictions: Any, references: Any) -> dict[str, float]:
    from sklearn.metrics import recall_score, roc_auc_score

    scores, truth = _array(predictions), _array(references)
    guess = scores.argmax(-1) if scores.ndim == 2 else scores
    result = {name: value for name, value in _classification(scores, truth).items() if name != "matthews"}
    result["class_accuracy"] = recall_score(truth, guess, labels=sorted(set(truth.tolist())), average="macro",
                                            zero_division=0)  # type: ignore[arg-type]
    if scores.ndim == 2 and scores.shape[1] == 2 and len(set(truth.tolist())) == 2:
        result["roc_auc"] = roc_auc_score(truth, scores[:, 1] - scores[:, 0])
    return result


def _multi_label(predictions: Any, references: Any) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, f1_score

    scores, truth = _array(predictions), _array(references) > 0
    there = [c for c in range(truth.shape[1]) if truth[:, c].any()]
    if not there:
        raise DataError("metrics of multi_label_image_classification: no example has a label.")
    return {"map_11": math.fsum(_eleven_points(scores[:, c], truth[:, c]) for c in there) / len(there),
            "map": average_precision_score(truth[:, there], scores[:, there], average="macro"),
            "macro_f1": f1_score(truth, scores > 0, average="macro", zero_division=0)}  # type: ignore[arg-type]


def _eleven_points(scores: Any, truth: Any) -> float:
    """Mean over r = 0, 0.1 ... 1 of max {precision at k : recall at k >= r}, k over the thresholds that scores give.

    In whole numbers, as 0.3 of 10 hits is not 3 of 10 in floats. ELEVATER's toolkit counts precision 1 at recall 0.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, scores)
    hits, every = (recall[:-1] * truth.sum()).round(), truth.sum()   # the last point is no threshold
    return math.fsum(precision[:-1][10 * hits >= k * every].max() for k in range(11)) / 11


def _regression(predictions: Any, references: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    guess, truth = (_array(values).reshape(len(values)).astype("float64")
                    for values in (predictions, references))
    result = {"pearson": 0.0, "spearman": 0.0, "mse": mean_squared_error(truth, guess)}
    if len(truth) > 1 and guess.std() > 0 and truth.std() > 0:
        result.update(pearson=pearsonr(guess, truth)[0], spearman=spearmanr(guess, truth)[0])
    else:
        log.warning("predictions or references do not vary: their correlation is undefined and counted as 0")
    return result


def tag_names(predictions: Any, labels: Any, names: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Scores [N, T, C] or ids [N, T], and labels [N, T] with -100, as the names of the scored tokens."""
    guess, truth = _array(predictions), _array(labels).astype(int)
    guess = (guess.argmax(-1) if guess.ndim == 3 else guess).astype(int)
    return tuple([[names[i] for i in row[keep]] for row, keep in zip(ids, truth != IGNORED, strict=True)]
                 for ids in (guess, truth))  # type: ignore[return-value]


def _token_classification(predictions: Any, references: Any) -> dict[str, float]:
    for i, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
        if len(guess) != len(truth):
            raise DataError(f"metrics of token_classification: sentence {i}: "
                            f"{len(guess)} tags for {len(truth)}.")
    pairs = [pair for guess, truth in zip(predictions, references, strict=True)
             for pair in zip(guess, truth, strict=True)]
    right = sum(g == t for g, t in pairs)
    result = {"accuracy": right / max(len(pairs), 1),
              "token_f1": _f1(sum(g == t != "O" for g, t in pairs), sum(g != "O" for g, _ in pairs),
                              sum(t != "O" for _, t in pairs))}
    if is_bio({tag for pair in pairs for tag in pair}):
        found = [entities(tags) for tags in predictions]
        there = [entities(tags) for tags in references]
        hits = sum(len(f & t) for f, t in zip(found, there, strict=True))
        result["entity_f1"] = _f1(hits, sum(map(len, found)), sum(map(len, there)))
    return result


def _f1(hits: int, found: int, there: int) -> float:
    """2 hits / (found + there): the harmonic mean of precision and recall; 0 where nothing is."""
    return 2 * hits / (found + there) if found + there else 0.0


def _seq2seq(predictions: Any, references: Any) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ExtraError(error.name or "sacrebleu", "generation", "Scoring generated text") from None
    answers = [[one] if isinstance(one, str) else list(one) for one in references]
    if not all(answers):
        raise DataError(f"metrics of seq2seq: example {answers.index([])} has no reference.")
    most = max(map(len, answers))
    streams = [[one[i] if i < len(one) else None for one in answers] for i in range(most)]
    rouge = RougeScorer(["rougeL"])
    longest = [rouge.score_multi(one, guess)["rougeL"].fmeasure
               for guess, one in zip(predictions, answers, strict=True)]
    guesses = list(predictions)
    return {"bleu": BLEU().corpus_score(guesses, streams).score,  # type: ignore[arg-type]
            "chrf": CHRF().corpus_score(guesses, streams).score,  # type: ignore[arg-type]
            "rougeL": 100 * math.fsum(longest) / len(longest)}


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of scored tokens of each example: what causal_lm's metrics read.

    -sum_t log softmax(logits[t])[labels[t + 1]] over labels that are not -100, in float32.

    Shapes:
        logits: (B, T, V); labels: (B, T); result: (B,) in nats, (B,).
    """
    targets = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets,
                                             ignore_index=IGNORED, reduction="none")
    return loss.sum(1), (targets != IGNORED).sum(1)


def _causal_lm(predictions: Any, references: Any) -> dict[str, float]:
    """Weighted by tokens: a mean of the means of batches would weigh short batches too much."""
    losses, tokens = _array(predictions), _array(references)
    if not tokens.sum():
        raise DataError("metrics of causal_lm: no token is scored; every text is a single token.")
    mean = math.fsum(losses.tolist()) / float(tokens.sum())
    return {"token_loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}


_SCORES: dict[str, Score] = {
    "classification": _classification, "image_classification": _image_classification, "regression": _regression,
    "multi_label_image_classification": _multi_label,
    "token_classification": _token_classification, "seq2seq": _seq2seq, "causal_lm": _causal_lm}
