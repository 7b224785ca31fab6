"""Metrics against their definitions, written the slow way."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.data import metrics
from slimtune.data.entities import entities, is_bio
from slimtune.data.metrics import METRICS, PRIMARY, tag_names
from slimtune.errors import DataError, TrainError

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20)
TAGS = ("O", "B-x", "I-x", "B-y", "I-y")
SENTENCES = st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=8), min_size=1,
                     max_size=5)


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_classification(pairs):
    guess, truth = zip(*pairs, strict=True)
    found = metrics("classification")(guess, truth)
    f1 = []
    for c in set(guess) | set(truth):
        hits = sum(g == t == c for g, t in pairs)
        f1.append(2 * hits / (guess.count(c) + truth.count(c)))
    assert found["accuracy"] == pytest.approx(sum(g == t for g, t in pairs) / len(pairs))
    assert found["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    assert ("matthews" in found) == (len(set(guess) | set(truth)) <= 2)


def test_matthews_of_two_classes():
    guess, truth = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]
    tp, tn, fp, fn = 2, 2, 1, 0
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics("classification")(guess, truth)["matthews"] == pytest.approx(expected)


def test_scores_are_argmaxed():
    scores = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    found = metrics("classification")(scores, np.array([1, 1]))
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((0 + 2 / 3) / 2)}


@settings(deadline=None, max_examples=50)
@given(NUMBERS)
def test_regression(pairs):
    guess, truth = np.array(pairs, dtype=float).T
    found = metrics("regression")(guess[:, None], truth)
    assert found["mse"] == pytest.approx(((guess - truth) ** 2).mean())

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    def ranks(a):
        return np.array([(a < v).sum() + ((a == v).sum() + 1) / 2 for v in a])

    if guess.std() and truth.std():
        assert found["pearson"] == pytest.approx(correlation(guess, truth), abs=1e-9)
        assert found["spearman"] == pytest.approx(correlation(ranks(guess), ranks(truth)), abs=1e-9)
    else:
        assert found["pearson"] == found["spearman"] == 0.0


def spans(tags):
    """Entities by brute force: every (type, i, j) whose inside continues and whose borders do not."""
    kind = [tag[2:] for tag in tags]

    def starts(i):
        return tags[i] != "O" and (tags[i][0] == "B" or i == 0 or tags[i - 1] == "O" or kind[i - 1] != kind[i])

    return {(kind[i], i, j) for i in range(len(tags)) if starts(i) for j in range(i + 1, len(tags) + 1)
            if all(tags[k] != "O" and not starts(k) for k in range(i + 1, j))
            and (j == len(tags) or tags[j] == "O" or starts(j))}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(TAGS), max_size=9))
def test_entities(tags):
    assert entities(tags) == spans(tags)


@settings(deadline=None, max_examples=50)
@given(SENTENCES)
def test_token_classification(sentences):
    guess, truth = ([[pair[side] for pair in one] for one in sentences] for side in (0, 1))
    found = metrics("token_classification")(guess, truth)
    pairs = [pair for one in sentences for pair in one]
    hits = sum(g == t and t != "O" for g, t in pairs)
    some = sum(g != "O" for g, _ in pairs), sum(t != "O" for _, t in pairs)
    assert found["accuracy"] == pytest.approx(sum(g == t for g, t in pairs) / max(len(pairs), 1))
    assert found["token_f1"] == pytest.approx(2 * hits / sum(some) if sum(some) else 0)
    if sum(some):
        f, t = ([spans(one) for one in side] for side in (guess, truth))
        both = sum(len(a & b) for a, b in zip(f, t, strict=True))
        assert found["entity_f1"] == pytest.approx(2 * both / (sum(map(len, f)) + sum(map(len, t))))


def test_tags_without_bio_have_no_entities():
    assert not is_bio({"NOUN", "VERB"})
    assert not is_bio({"O"})
    assert "entity_f1" not in metrics("token_classification")([["NOUN"]], [["VERB"]])


def test_names_of_scored_tokens():
    scores = torch.eye(3)[torch.tensor([[0, 1, 2], [2, 2, 2]])]
    labels = torch.tensor([[-100, 1, 0], [2, -100, -100]])
    assert tag_names(scores, labels, ["O", "B-x", "I-x"]) == ([["B-x", "I-x"], ["I-x"]], [["B-x", "O"], ["I-x"]])


def lcs(a, b):
    if not a or not b:
        return 0
    return 1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


def test_seq2seq():
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    guess = ["the cat sat on the mat", "there is a pub in town"]
    truth = [["the cat is on the mat", "a cat sat on the mat"], ["in town there is a pub"]]
    found = metrics("seq2seq")(guess, truth)
    streams = [["the cat is on the mat", "in town there is a pub"], ["a cat sat on the mat", None]]
    assert found["bleu"] == sacrebleu.corpus_bleu(guess, streams).score
    assert found["chrf"] == sacrebleu.corpus_chrf(guess, streams).score
    f1 = [max(2 * lcs(g.split(), r.split()) / (len(g.split()) + len(r.split())) for r in refs)
          for g, refs in zip(guess, truth, strict=True)]
    assert found["rougeL"] == pytest.approx(100 * sum(f1) / 2)
    assert metrics("seq2seq")(["a b c d e"], ["a b c d e"]) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100),
                                                               "rougeL": pytest.approx(100)}
    with pytest.raises(DataError, match="example 1 has no reference"):
        metrics("seq2seq")(["a", "b"], [["a"], []])


def test_e2e_with_all_references(shared):
    import csv

    with (shared / "e2e_nlg" / "devset.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:400]
    by_mr: dict[str, list[str]] = {}
    for row in rows:
        by_mr.setdefault(row["mr"], []).append(row["ref"])
    assert len({len(refs) for refs in by_mr.values()}) > 1
    found = metrics("seq2seq")([refs[0] for refs in by_mr.values()], list(by_mr.values()))
    assert found == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "rougeL": pytest.approx(100)}
    others = [refs for refs in by_mr.values() if len(refs) > 1]
    human = metrics("seq2seq")([refs[0] for refs in others], [refs[1:] for refs in others])
    assert 10 < human["bleu"] < 100


def test_perplexity_is_weighted_by_tokens():
    found = metrics("causal_lm")([2.0, 30.0], [1, 9])
    assert found == {"token_loss": pytest.approx(3.2), "perplexity": pytest.approx(math.exp(3.2))}
    assert metrics("causal_lm")([1e5], [10])["perplexity"] == math.inf
    with pytest.raises(DataError, match="no token is scored"):
        metrics("causal_lm")([0.0], [0])


def test_refusals():
    with pytest.raises(DataError, match="2 predictions for 1 references"):
        metrics("classification")([1, 2], [1])
    with pytest.raises(DataError, match="0 predictions"):
        metrics("regression")([], [])
    with pytest.raises(DataError, match="Did you mean 'classification'"):
        metrics("classifcation")
    with pytest.raises(DataError, match="sentence 1: 1 tags for 2"):
        metrics("token_classification")([["O"], ["O"]], [["O"], ["O", "O"]])
    for task in ("classification", "regression"):
        with pytest.raises(TrainError, match="NaN or infinite"):
            metrics(task)([[float("nan")]], [1])


def test_every_figure_has_a_unit():
    seen = set()
    for task, (guess, truth) in {"classification": ([0, 1], [0, 1]), "regression": ([0, 1], [0, 1]),
                                 "image_classification": ([[1.0, 0.0], [0.0, 1.0]], [0, 1]),
                                 "multi_label_image_classification": ([[1.0, -1.0]], [[1, 0]]),
                                 "token_classification": ([["B-x"]], [["B-x"]]), "causal_lm": ([1.0], [1])}.items():
        found = metrics(task)(guess, truth)
        assert PRIMARY[task] in found
        seen |= set(found)
    assert seen | {"bleu", "chrf", "rougeL"} == set(METRICS)
    assert [name for name, metric in METRICS.items() if not metric.higher] == ["mse", "perplexity", "token_loss"]


def test_image_classification():
    scores, truth = [[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]], [0, 0, 0, 1]
    found = metrics("image_classification")(scores, truth)
    assert set(found) == {"accuracy", "class_accuracy", "macro_f1", "roc_auc"}
    assert found["accuracy"] == 0.75
    assert found["class_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["roc_auc"] == 1.0   # the one positive scores above the three negatives
    many = metrics("image_classification")([[1, 0, 0], [0, 1, 0]], [0, 1])
    assert many["class_accuracy"] == 1.0   # a class that does not occur does not count
    assert "roc_auc" not in many
    assert "roc_auc" not in metrics("image_classification")([[1, 0], [0, 1]], [0, 0])   # no pair to rank
