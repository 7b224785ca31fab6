"""Losses that need more than the task's, and what a model is worth against an attacker."""
from slimtune.objectives.adversarial import FreeLB, adversarial_backward, offset, word_embeddings
from slimtune.objectives.attack import PGD, Attacked, Robustness, pgd
from slimtune.objectives.swap import WordSwap
from slimtune.objectives.synonyms import synonyms

__all__ = ["PGD", "Attacked", "FreeLB", "Robustness", "WordSwap", "adversarial_backward", "offset", "pgd", "synonyms",
           "word_embeddings"]
