"""Greedy word substitution: the most important words first, each for the synonym that hurts most.

    I_i = F_y(x) - F_y(x without w_i),   + F_y'(x without w_i) - F_y'(x) where leaving w_i out gives the class y'
    in the order of I: w_i -> the candidate with the lowest F_y; the first candidate that changes the class ends it

F is the softmax. A word is left out by putting a token for unknown words in its place. No part-of-speech check and no
sentence encoder, which need models of their own: what may stand for what is the table's matter.

Source: D. Jin et al., 2020, "Is BERT Really Robust? A Strong Baseline for Natural Language Attack on Text
Classification and Entailment", arXiv 1907.11932, equation 2 and algorithm 1.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from slimtune.errors import RecipeError
from slimtune.objectives.attack import Attacked

Predict = Callable[[Sequence[str]], Tensor]
"""Texts -> logits [N, classes]; a text is a query."""

STOP_WORDS = frozenset("""
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each either else for from further had has have having he her here hers him his
how i if in into is it its itself just may me might more most must my neither never no nor not of off on once only or
other our ours out over own s same shall she should so some such t than that the their them then there these they this
those through to too under until up upon very was we were what when where which while who whom why will with would you
your yours n't ca wo 're 've 'll 'd 'm
""".split())  # noqa: SIM905


@dataclass(frozen=True)
class WordSwap:
    """The attack. table: for a lower-case word, what may stand for it, nearest first.

    share: the largest share of words that may change, one word at least; unknown: what stands for a word left out.

    Example:
        >>> import torch
        >>> good = lambda texts: torch.tensor([[0.0, t.count("good") - t.count("fine") - 0.5] for t in texts])
        >>> WordSwap({"good": ("fine",)}).attack(good, "a good film", 1).text
        'a fine film'
    """

    table: Mapping[str, Sequence[str]] = field(repr=False)
    share: float = 0.3
    unknown: str = "[UNK]"
    stop_words: frozenset[str] = field(default=STOP_WORDS, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"share is {self.share}: it is above 0 and at most 1.")

    def attack(self, predict: Predict, text: str, label: int) -> Attacked:
        """Attack one text; words are what white space parts."""
        words = text.split()
        clean = predict([text]).float().softmax(-1)[0]
        if int(clean.argmax()) != label:
            return Attacked(False, False, 1, text)
        places = [i for i, word in enumerate(words) if self._candidates(word)]
        queries, current, changed = 1 + len(places), float(clean[label]), 0
        budget = max(1, int(self.share * len(words)))
        for i in self._order(predict, words, places, clean, label)[:budget]:
            candidates = self._candidates(words[i])
            scores = predict([" ".join(_with(words, i, c)) for c in candidates]).float().softmax(-1)
            queries += len(candidates)
            flips = (scores.argmax(-1) != label).nonzero()
            best = int(flips[0]) if len(flips) else int(scores[:, label].argmin())
            if len(flips) or float(scores[best, label]) < current:
                words, current, changed = _with(words, i, candidates[best]), float(scores[best, label]), changed + 1
            if len(flips):
                return Attacked(True, True, queries, " ".join(words), changed / len(words))
        return Attacked(True, False, queries, " ".join(words), changed / max(len(words), 1))

    def _candidates(self, word: str) -> Sequence[str]:
        word = word.lower()
        return () if word in self.stop_words else self.table.get(word, ())

    def _order(self, predict: Predict, words: list[str], places: list[int], clean: Tensor, label: int) -> list[int]:
        """The places by importance, the highest first; ties from left to right."""
        if not places:
            return []
        without = predict([" ".join(_with(words, i, self.unknown)) for i in places]).float().softmax(-1)
        importance = clean[label] - without[:, label]
        other = without.argmax(-1)
        importance = importance + (without.gather(1, other[:, None])[:, 0] - clean[other]) * (other != label)
        return [places[int(i)] for i in importance.argsort(descending=True, stable=True)]


def _with(words: list[str], place: int, word: str) -> list[str]:
    return [*words[:place], word, *words[place + 1:]]
