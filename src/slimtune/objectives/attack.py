"""What a model is worth under attack: accuracy, how often an attack succeeds, and what it costs the attacker.

    Clean = share that is right;   Aua = share that is right and stays so under attack
    Suc = (Clean - Aua) / Clean;   #Query = mean model queries on what was right

`pgd` moves word embeddings within a ball; `swap.py` exchanges words.

Source: R. Zheng et al., 2022, "Robust Lottery Tickets for Pre-trained Language Models", arXiv 2211.03013, section 4.2;
A. Madry et al., 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv 1706.06083, equation 2.3.
"""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimtune.errors import DataError, RecipeError, listing
from slimtune.objectives.adversarial import Offset, ascend, offset, uniform_start


@dataclass(frozen=True)
class Attacked:
    """One example. right: before the attack; broken: by it; queries: forward passes, the clean one included.

    text: what the attack ended with, where it works on texts; changed: the share of words that differ.
    """

    right: bool
    broken: bool
    queries: int
    text: str | None = None
    changed: float = 0.0


@dataclass(frozen=True)
class Robustness:
    """Clean, Aua and Suc as shares of 1, and #Query; examples: how many were tried.

    Example:
        >>> Robustness.of([Attacked(True, True, 8), Attacked(True, False, 12), Attacked(False, False, 1)]).success
        0.5
    """

    clean: float
    under_attack: float
    queries: float
    examples: int

    @property
    def success(self) -> float:
        """Suc = (Clean - Aua) / Clean; 0 for a model that is never right."""
        return (self.clean - self.under_attack) / self.clean if self.clean else 0.0

    @classmethod
    def of(cls, attacked: Sequence[Attacked]) -> "Robustness":
        """Errors: DataError for no examples."""
        if not attacked:
            raise DataError("nothing was attacked.")
        right = [a for a in attacked if a.right]
        held = sum(not a.broken for a in right)
        queries = sum(a.queries for a in right) / len(right) if right else 0.0
        return cls(len(right) / len(attacked), held / len(attacked), queries, len(attacked))


@dataclass(frozen=True)
class PGD:
    """radius: the largest Frobenius norm of a sentence's disturbance; steps of length `rate`; start: as FreeLB's."""

    radius: float
    rate: float
    steps: int = 10
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.radius <= 0 or self.rate <= 0 or self.steps < 1 or not 0 <= self.start <= self.radius:
            raise RecipeError(f"{self}: radius and rate are above 0, steps 1 or more, and the start within the radius.")


def pgd(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], spec: PGD, *,
        generator: torch.Generator | None = None, embed: nn.Module | None = None) -> list[Attacked]:
    """Attack each sentence by projected gradient ascent of its loss on the word embeddings.

        d <- P(d + rate * g / |g|_F),   P onto |d|_F <= radius;   broken as soon as one d changes the prediction

    The model runs in the mode it is in, so call eval() first; no parameter gets a gradient. batches: classification,
    with labels. Errors: DataError for a batch without them; SiteError for a model without word embeddings.
    """
    found: list[Attacked] = []
    for batch in batches:
        if "labels" not in batch:
            raise DataError(f"pgd needs labels; the batch has: {listing(batch)}.", "Add them to the batch.")
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with offset(model, inputs, embed) as added, torch.enable_grad():
            def visit(value: Tensor, added: Offset = added, inputs: dict[str, Tensor] = inputs) -> Tensor:
                added.value = value.detach().requires_grad_()
                return model(**inputs).logits.float()

            logits = visit(added.mask.new_zeros((*added.mask.shape[:2], added.width)))
            added.check()
            right = logits.argmax(-1) == labels
            broken, queries = torch.zeros_like(right), torch.ones_like(labels)
            for step in range(spec.steps + (spec.start > 0)):
                if bool((broken | ~right).all()):
                    break
                if step == 0 and spec.start > 0:
                    value = uniform_start(added, spec.start, generator)
                else:
                    loss = functional.cross_entropy(logits, labels, reduction="sum")
                    assert added.value is not None
                    (gradient,) = torch.autograd.grad(loss, added.value)
                    value = ascend(added.value.detach(), gradient, spec.rate, added.mask, spec.radius)
                logits = visit(value)
                queries += (right & ~broken).long()
                broken |= right & (logits.argmax(-1) != labels)
        found += [Attacked(*one) for one in zip(right.tolist(), broken.tolist(), queries.tolist(), strict=True)]
    return found
