"""The adapter for TextAttack: the victim against plain torch, the errors, and real attacks where the package is."""
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from slimtune.core import attach
from slimtune.errors import DataError, ExtraError, SlimtuneError
from slimtune.io.models import load_tokenizer
from slimtune.methods import LoRA
from slimtune.objectives import Robustness
from slimtune.objectives.textattack import GONE, Victim, attack_texts, attacked, load

TEXTS = ["a fine film about unbelievable things", "it is dull", "the plot was thin and the acting thinner"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, initializer_range=0.5, num_labels=3)
    return BertForSequenceClassification(config).train()


def test_the_victim_says_the_softmax_of_the_logits_of_the_model_as_it_is_deployed(model, tokenizer):
    delta = attach(model, LoRA(rank=2))
    torch.nn.init.normal_(next(p for n, p in delta.named_parameters() if n.endswith(".B")))
    found = Victim(model, tokenizer)(TEXTS)
    assert model.training  # as it was
    model.eval()
    one_by_one = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    assert not found.requires_grad
    assert (found.sum(-1) - 1).abs().max() < 1e-12  # within TextAttack's 1e-6: it takes no second softmax
    torch.testing.assert_close(found, torch.stack(one_by_one).detach().double().softmax(-1), rtol=1e-4, atol=1e-6)
    with delta.disabled():
        assert (Victim(model, tokenizer)(TEXTS) - found).abs().max() > 1e-3


def test_pairs_are_told_from_texts_and_long_ones_are_cut(model, tokenizer):
    model.eval()
    pair = model(**tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")).logits.double().softmax(-1)
    torch.testing.assert_close(Victim(model, tokenizer)([(TEXTS[0], TEXTS[1])]), pair.detach(), rtol=1e-4, atol=1e-6)
    short = Victim(model, tokenizer, max_length=4)
    assert torch.equal(short(["a fine film"]), short(["a fine thing of another kind"]))


def test_the_gradient_is_that_of_the_word_embeddings_row_by_token(model, tokenizer):
    found = Victim(model, tokenizer).get_grad(TEXTS[0])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    functional.cross_entropy(logits, logits.argmax(-1)).backward()
    torch.testing.assert_close(torch.from_numpy(found["gradient"]), embedded.grad[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(found["ids"], batch["input_ids"])
    tokens = Victim(model, tokenizer).tokenize(TEXTS[:1])[0]
    assert tokens == tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    bare = Victim(model, tokenizer).tokenize(TEXTS[:1], strip_prefix=True)[0]
    assert len(bare) == len(found["gradient"])
    assert "".join(bare) == "[CLS]" + TEXTS[0].replace(" ", "") + "[SEP]"


def side(output: int, words: str):
    text = SimpleNamespace(text=words, num_words=len(words.split()), words_diff_num=lambda other: sum(
        a != b for a, b in zip(words.split(), other.text.split(), strict=True)))
    return SimpleNamespace(output=output, ground_truth_output=1, attacked_text=text)


@pytest.mark.parametrize(("before", "after", "right", "broken"), [(1, 0, True, True), (1, 1, True, False),
                                                                 (0, 0, False, False), (0, 2, False, False)])
def test_results_are_told_by_the_classes_alone(before: int, after: int, right: bool, broken: bool):
    result = SimpleNamespace(original_result=side(before, "a fine film"), perturbed_result=side(after, "a good film"),
                             num_queries=7)
    found = attacked(result)
    assert (found.right, found.broken, found.queries, found.text) == (right, broken, 7, "a good film")
    assert found.changed == 1 / 3


def test_without_the_package_the_error_names_the_extra_and_transformers_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "textattack", None)
    with pytest.raises(ExtraError, match=r"(?s)pip install 'slimtune\[textattack\]'.*--no-deps textattack flair"):
        load()
    assert not hasattr(sys.modules["transformers"], GONE)


@pytest.mark.parametrize(("code", "told"), [
    ("import no_such_package_of_textattack", "cannot be loaded: No module named"),
    ("raise LookupError('***\\n Resource stopwords not found.\\n >>> import nltk\\n***')", "nltk.downloader stopwords"),
    (f"from transformers import {GONE} as gone\nraise ImportError(gone.__name__)", f"cannot be loaded: {GONE}")])
def test_a_package_that_does_not_load_says_what_it_lacks(monkeypatch, tmp_path, code: str, told: str):
    (tmp_path / "textattack.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "textattack"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SlimtuneError, match=told) as caught:
        load()
    assert not isinstance(caught.value, ExtraError)
    assert not hasattr(sys.modules["transformers"], GONE)


# ---- with the real package: pip install 'slimtune[textattack]', and what its error says

@pytest.fixture(scope="module")
def real():
    try:
        return load()
    except SlimtuneError as error:
        pytest.skip(str(error))


class Counted(Victim):
    asked = 0

    def __call__(self, texts):
        self.asked += len(texts)
        return super().__call__(texts)


def test_a_recipe_breaks_the_victim_and_its_results_hold_in_the_victims_own_eyes(real, model, tokenizer):
    victim = Counted(model, tokenizer)
    assert isinstance(victim, real.models.wrappers.ModelWrapper)
    labels = victim(TEXTS).argmax(-1).tolist()
    labels[1] = (labels[1] + 1) % 3  # one that is wrong already
    victim.asked = 0
    attack = real.attack_recipes.DeepWordBugGao2018.build(victim)
    attack.goal_function.use_cache = False  # so that what TextAttack counts is what it asks
    found = attack_texts(attack, TEXTS, labels)
    assert [one.right for one in found] == [True, False, True]
    assert found[1].queries == 1
    assert sum(one.queries for one in found) == victim.asked
    for text, label, one in zip(TEXTS, labels, found, strict=True):
        assert (int(victim([text]).argmax()) == label) == one.right
        assert (int(victim([one.text]).argmax()) != label) == (one.broken or not one.right)
        assert (one.changed == 0) == (one.text == text)
    table = Robustness.of(found)
    assert (table.clean, table.under_attack) == (2 / 3, sum(o.right and not o.broken for o in found) / 3)
    assert any(one.broken for one in found)


def test_an_attack_by_gradients_reads_the_victims_rows(real, model, tokenizer):
    victim = Victim(model, tokenizer)
    search = real.search_methods.GreedyWordSwapWIR(wir_method="gradient")
    attack = real.Attack(real.goal_functions.UntargetedClassification(victim), [],
                         real.transformations.WordSwapRandomCharacterDeletion(), search)
    label = int(victim(TEXTS[:1]).argmax())
    (found,) = attack_texts(attack, TEXTS[:1], [label])
    assert found.right
    assert found.queries > 1
    pair = attack_texts(attack, [(TEXTS[0], TEXTS[1])], [int(victim([(TEXTS[0], TEXTS[1])]).argmax())])
    assert pair[0].right


def test_goals_that_are_not_of_classes_and_lone_labels_are_refused(real, model, tokenizer):
    attack = SimpleNamespace(goal_function=object())
    with pytest.raises(DataError, match="no goal of a classifier"):
        attack_texts(attack, TEXTS, [0, 1, 2])
    with pytest.raises(DataError, match="3 texts and 1 labels"):
        attack_texts(attack, TEXTS, [0])
