"""TextAttack's attacks on a slimtune model, and what they find in slimtune's words. An optional extra.

    right  = the class of the text is its label
    broken = right, and the class of the text that the attack ended with is another
    queries as TextAttack counts them: every text it asked for, the clean one and those its cache knows included

    attack = load().attack_recipes.DeepWordBugGao2018.build(Victim(model, tokenizer))
    Robustness.of(attack_texts(attack, texts, labels))

Source: J. X. Morris et al., 2020, "TextAttack: A Framework for Adversarial Attacks, Data Augmentation, and Adversarial
Training in NLP", arXiv 2005.05909, sections 2 and 3.
"""
import importlib
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimtune.core.modes import evaluating
from slimtune.errors import DataError, ExtraError, SlimtuneError
from slimtune.objectives.adversarial import offset
from slimtune.objectives.attack import Attacked

UNPINNED = "pip install --no-deps textattack flair transformer-smaller-training-vocab"
"""flair and transformer-smaller-training-vocab, which textattack needs, ask for transformers below 5 and run with 5."""
WORDS = "python -m nltk.downloader stopwords averaged_perceptron_tagger_eng universal_tagset wordnet omw-1.4 punkt"
MARKS = ("##", "Ġ", "▁")
"""What tokenizers put before a piece."""
GONE = "LayoutLMv2FeatureExtractor"
"""flair 0.15 imports this class, to ask whether an extractor is one; transformers 5 has none any more."""


def load() -> Any:
    """The package textattack, with slimtune's `Victim` known to it as a model wrapper.

    Errors: ExtraError when it is not installed; SlimtuneError when it, or what it needs, cannot be loaded.
    """
    try:
        with _without():
            package = importlib.import_module("textattack")
    except LookupError as error:
        if "nltk" not in str(error):
            raise
        lacking = next(line.strip() for line in str(error).splitlines() if "not found" in line)
        raise SlimtuneError(f"textattack is installed, and NLTK's word lists, which it reads, are not: {lacking}",
                            f"Get them with: {WORDS}") from error
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "textattack":
            raise ExtraError("textattack", "textattack", "Attacking with TextAttack", f"and then: {UNPINNED}") from None
        raise SlimtuneError(f"textattack is installed, and cannot be loaded: {error}.",
                            "Install it again with: pip install --force-reinstall 'slimtune[textattack]'",
                            f"and then: {UNPINNED}") from error
    package.models.wrappers.ModelWrapper.register(Victim)
    return package


class Victim:
    """A classifier as TextAttack's attacks see it, with the deltas that are active when it is asked.

    It is queried in eval mode and without gradients, and left in the mode it was in; no parameter gets a gradient.
    max_length: of a text or pair in tokens, what is longer is cut.

    Shapes: texts -> [N, classes] of float64, the softmax of the logits.
    Example:
        >>> from slimtune.testing import tiny
        >>> ids = lambda texts, pairs=None, **options: {"input_ids": torch.tensor([[len(t), 3] for t in texts])}
        >>> Victim(tiny("bert"), ids)(["a film", "a good film"]).sum(-1).tolist()
        [1.0, 1.0]
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int = 128) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @torch.no_grad()
    def __call__(self, text_input_list: Sequence[str | Sequence[str]]) -> Tensor:
        with evaluating(self.model):
            logits: Tensor = self.model(**self._batch(text_input_list)).logits
        # float64, for TextAttack takes a softmax again where a row's sum is 1e-6 off 1
        return logits.double().softmax(-1).cpu()

    def get_grad(self, text_input: str | Sequence[str]) -> dict[str, Any]:
        """Of the loss of the model's own answer, by the word embeddings: {"ids": [1, T], "gradient": [T, d] of numpy}.

        Errors: SiteError for a model without word embeddings.
        """
        batch = self._batch([text_input])
        with evaluating(self.model), torch.enable_grad(), offset(self.model, batch) as added:
            value = added.value = added.mask.new_zeros((*added.mask.shape[:2], added.width)).requires_grad_()
            logits = self.model(**batch).logits.float()
            added.check()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, logits.argmax(-1)), value)
        return {"ids": batch["input_ids"], "gradient": gradient[0].float().cpu().numpy()}

    def tokenize(self, inputs: Sequence[str | Sequence[str]], strip_prefix: bool = False) -> list[list[str]]:
        """The tokens of each text, special ones included, as the rows of `get_grad` stand for them."""
        found = [self.tokenizer.convert_ids_to_tokens(self._batch([text])["input_ids"][0].tolist()) for text in inputs]
        return [[_bare(token) for token in tokens] for tokens in found] if strip_prefix else found

    def _batch(self, texts: Sequence[str | Sequence[str]]) -> dict[str, Tensor]:
        """Encoded texts, or pairs of texts, where the model is."""
        first = [text if isinstance(text, str) else text[0] for text in texts]
        second = [text[1] for text in texts if not isinstance(text, str)] or None
        found = self.tokenizer(first, second, padding=True, truncation=True, max_length=self.max_length,
                               return_tensors="pt")
        device = next(self.model.parameters()).device
        return {key: value.to(device) for key, value in found.items()}


def attack_texts(attack: Any, texts: Iterable[str | Sequence[str]], labels: Iterable[int]) -> list[Attacked]:
    """Run one of TextAttack's attacks, which was built on a `Victim`, on each text or pair of texts in turn.

    Errors: DataError when texts and labels are not as many, or the attack's goal is not about classes.
    """
    texts, labels = list(texts), list(labels)
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels.", "Give one label for each text.")
    goals = load().goal_functions.ClassificationGoalFunction
    if not isinstance(attack.goal_function, goals):
        raise DataError(f"{type(attack.goal_function).__name__} is no goal of a classifier.",
                        "Build the attack with a goal such as UntargetedClassification.")
    return [attacked(attack.attack(text if isinstance(text, str) else OrderedDict(enumerate(text)), int(label)))
            for text, label in zip(texts, labels, strict=True)]


def attacked(result: Any) -> Attacked:
    """One AttackResult of a classifier in slimtune's words. changed: words by edit distance, over those there were."""
    clean, found = result.original_result, result.perturbed_result
    before, after = clean.attacked_text, found.attacked_text
    right = clean.output == clean.ground_truth_output
    return Attacked(right, right and found.output != clean.ground_truth_output, int(result.num_queries), after.text,
                    before.words_diff_num(after) / max(before.num_words, 1))


def _bare(token: str) -> str:
    for mark in MARKS:
        token = token.replace(mark, "")
    return token


@contextmanager
def _without() -> Iterator[None]:
    """While it is open, transformers has a class of the name that flair asks for, of which nothing is one."""
    importlib.import_module("transformers.processing_utils")  # which puts a new transformers in the old one's place
    transformers = sys.modules["transformers"]
    lacking = not hasattr(transformers, GONE)
    if lacking:
        setattr(transformers, GONE, type(GONE, (), {}))
    try:
        yield
    finally:
        if lacking and hasattr(transformers, GONE):
            delattr(transformers, GONE)
