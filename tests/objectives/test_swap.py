"""The word attack on a bag of words, whose answer is known, and by its own rules; the synonym table."""
import pytest
import torch
from torch import Tensor

from slimtune.errors import DataError, RecipeError
from slimtune.objectives import WordSwap, synonyms

VALUES = {"superb": 2.0, "fine": 1.0, "okay": 0.25, "solid": 0.5, "watchable": -0.5, "dire": -3.0}
TABLE = {"superb": ("fine", "okay"), "fine": ("okay", "solid"), "solid": ("watchable", "dire", "okay")}


class Bag:
    """Positive while the words' values add up to more than 0."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts) -> Tensor:
        self.asked += texts
        return torch.tensor([[0.0, sum(VALUES.get(w, 0.0) for w in t.split())] for t in texts])


def test_it_takes_the_most_important_word_first_and_the_worst_candidate():
    bag = Bag()
    found = WordSwap(TABLE, share=1.0).attack(bag, "a superb and solid film", 1)
    assert bag.asked == ["a superb and solid film", "a [UNK] and solid film", "a superb and [UNK] film",
                         "a fine and solid film", "a okay and solid film",           # superb weighs 2 of 2.5
                         "a okay and watchable film", "a okay and dire film", "a okay and okay film"]
    assert found.text == "a okay and watchable film"                                 # the nearest one that flips
    assert (found.right, found.broken, found.queries) == (True, True, len(bag.asked))
    assert found.changed == 2 / 5


def test_the_share_of_words_bounds_it_and_one_word_is_always_allowed():
    found = WordSwap(TABLE, share=0.1).attack(Bag(), "a superb and solid film", 1)
    assert (found.broken, found.text, found.changed) == (False, "a okay and solid film", 0.2)


def test_stop_words_stay_and_words_without_synonyms_are_not_asked_for():
    bag = Bag()
    swap = WordSwap({**TABLE, "and": ("dire",)}, share=1.0, stop_words=frozenset({"and", "superb"}))
    found = swap.attack(bag, "superb and fine", 1)
    assert bag.asked == ["superb and fine", "superb and [UNK]", "superb and okay", "superb and solid"]
    assert (found.broken, found.text) == (False, "superb and okay")


def test_a_candidate_that_helps_the_model_is_not_taken():
    found = WordSwap({"okay": ("superb",)}).attack(Bag(), "okay film", 1)
    assert (found.text, found.changed, found.queries) == ("okay film", 0, 3)


def test_what_is_wrong_already_costs_one_query():
    found = WordSwap(TABLE).attack(Bag(), "a superb film", 0)
    assert (found.right, found.broken, found.queries) == (False, False, 1)
    assert WordSwap(TABLE).attack(Bag(), "solid", 1).text == "watchable"
    with pytest.raises(RecipeError):
        WordSwap(TABLE, share=0)


def test_importance_counts_the_class_that_a_missing_word_lets_in():
    """Equation 2: i of them leave class 1 with the same loss of it, the one that lets another class win weighs more."""
    def predict(texts) -> Tensor:
        rows = {"x y": [0.1, 0.5, 0.4], "[UNK] y": [0.5, 0.45, 0.05], "x [UNK]": [0.3, 0.4, 0.3]}
        return torch.tensor([rows.get(t, [0.1, 0.5, 0.4]) for t in texts]).log()

    asked: list[str] = []
    WordSwap({"x": ("p",), "y": ("q",)}, share=1.0).attack(lambda t: (asked.extend(t), predict(t))[1], "x y", 1)
    assert asked[3:] == ["p y", "x q"]  # 0.05 + 0.4 for x, 0.1 for y


def test_the_table_is_the_nearest_whole_words_above_the_threshold():
    generator = torch.Generator().manual_seed(0)
    tokens = [*(f"word{chr(97 + i)}" for i in range(26)), "##word", "[MASK]", "it", "w1rd"]
    vectors = torch.randn(30, 3, generator=generator)
    vectors[26:] = vectors[0]
    found = synonyms(tokens, vectors, threshold=0.6, limit=3, veto=lambda a, b: b == "wordb")
    for i in range(26):
        cosine = torch.cosine_similarity(vectors[i], vectors[:26], dim=-1)
        near = [tokens[j] for j in cosine.argsort(descending=True).tolist() if cosine[j] >= 0.6 and j != i]
        assert list(found.get(tokens[i], ())) == [w for w in near if w != "wordb"][:3]
    assert synonyms(tokens, vectors, words=["wordc", "it"], threshold=0.6, limit=3).keys() <= {"wordc"}
    with pytest.raises(DataError):
        synonyms(tokens[:-1], vectors)
