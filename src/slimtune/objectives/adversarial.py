"""FreeLB: the loss against small, learned disturbances of the word embeddings.

    d_0 ~ U(-1, 1) * e0 / sqrt(L d)                                   a sentence of L tokens, embeddings of width d
    K times:  loss(x + d) / K backward;   d <- d + eta * g / max(|g|_F, 1e-8),   g = the loss's gradient by d

The gradients of all K passes add up in the parameters. d is not projected unless `max_norm` is given, and is 0 on
padding. |.|_F goes over the whole sentence.

Source: C. Zhu et al., 2020, "FreeLB: Enhanced Adversarial Training for Natural Language Understanding",
arXiv 1909.11764, algorithm 1; with the constants of R. Zheng et al., 2022, "Robust Lottery Tickets for Pre-trained
Language Models", arXiv 2211.03013.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import dissect
from slimtune.errors import RecipeError, SiteError, listing
from slimtune.sparsity.view import task_loss

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(model, batch) -> the mean loss of the batch."""


@dataclass(frozen=True)
class FreeLB:
    """steps: K; rate: eta; start: e0; max_norm: the largest norm of a sentence's disturbance, None for any.

    steps=1 with start=0 is the plain loss. compat="official" leaves token_type_ids out of the passes, as the robust
    tickets' code does.
    """

    steps: int = 5
    rate: float = 0.03
    start: float = 0.05
    max_norm: float | None = None
    compat: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate < 0 or self.start < 0 or (self.max_norm is not None and self.max_norm <= 0):
            raise RecipeError(f"{self}: steps is 1 or more, rate and start 0 or more, and max_norm above 0.")


class Offset:
    """What is added to the word embeddings of a batch while `offset` is open; None adds nothing."""

    def __init__(self, ids: Tensor, mask: Tensor, width: int) -> None:
        self.ids, self.mask, self.width = ids, mask, width
        self.value: Tensor | None = None
        self.used = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        ids = args[0] if args else kwargs["input"]
        if ids.data_ptr() != self.ids.data_ptr() or ids.shape != self.ids.shape:  # a decoder that shares the table
            return None
        self.used = True
        return out if self.value is None else out + self.value.to(out.dtype)

    def check(self) -> None:
        """Errors: SiteError when the model ran and did not look the batch's words up."""
        if not self.used:
            raise SiteError("the word embeddings were not read, so nothing could disturb them.",
                            "Give the model input_ids, and embed= the module that looks them up.")


def word_embeddings(model: nn.Module) -> nn.Module:
    """The module that looks words up: the first tower's `embed` site. Errors: SiteError when it has no words."""
    sites = [site for site in dissect(model).sites if site.role == "embed"]
    for site in sites:
        module = model.get_submodule(site.path)
        if isinstance(module, nn.Embedding):
            return module
    raise SiteError(f"{type(model).__name__} has no word embeddings to disturb.",
                    f"Its embed sites are: {listing(s.path for s in sites) or 'none'}", "Give embed= a module.")


@contextmanager
def offset(model: nn.Module, batch: Mapping[str, Tensor], embed: nn.Module | None = None) -> Iterator[Offset]:
    """While it is open, `Offset.value` [B, T, d] is added to the embeddings of this batch's words.

    A hook does it and is always removed. embed: the module that looks words up, by default that of the anatomy.
    """
    embed = embed if embed is not None else word_embeddings(model)
    ids = batch["input_ids"]
    weight: Tensor = embed.weight  # type: ignore[assignment]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    added = Offset(ids, mask.unsqueeze(-1).to(weight.dtype), weight.shape[-1])
    handle = embed.register_forward_hook(added.hook, with_kwargs=True)
    try:
        yield added
    finally:
        handle.remove()


def uniform_start(added: Offset, size: float, generator: torch.Generator | None = None) -> Tensor:
    """U(-1, 1) * size / sqrt(L d) for each sentence, 0 on padding; its norm is at most `size`. [B, T, d]"""
    mask = added.mask
    drawn = torch.rand((*mask.shape[:2], added.width), generator=generator, dtype=mask.dtype, device=mask.device)
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    return (2 * drawn - 1) * mask * size / (tokens * added.width).sqrt()


def ascend(value: Tensor, gradient: Tensor, rate: float, mask: Tensor, max_norm: float | None) -> Tensor:
    """value + rate * g / |g|, the norm over the whole sentence, then onto the ball of max_norm."""
    gradient = gradient * mask
    value = value + rate * gradient / norm(gradient).clamp(min=1e-8)
    return value if max_norm is None else value * (max_norm / norm(value).clamp(min=1e-12)).clamp(max=1)


def norm(value: Tensor) -> Tensor:
    """Frobenius norm of each sentence, [B, 1, 1]."""
    return torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)


def adversarial_backward(model: nn.Module, batch: Mapping[str, Tensor], spec: FreeLB, *,
                         generator: torch.Generator | None = None, loss: Loss = task_loss,
                         around: Callable[[], AbstractContextManager[Any]] = nullcontext,
                         embed: nn.Module | None = None) -> float:
    """Run the K passes; their gradients, of the mean loss over the passes, are added to the parameters' `.grad`.

    around: opened around each forward and backward pass, such as a new sample of gates. Returns the mean loss.
    Errors: SiteError for a model without word embeddings; MethodError for a batch without labels.

    Example:
        >>> from slimtune.testing import tiny, batch
        >>> value = adversarial_backward(tiny("bert"), batch("bert"), FreeLB(steps=2))
        >>> value > 0
        True
    """
    batch = {key: value for key, value in batch.items() if spec.compat == "paper" or key != "token_type_ids"}
    total = 0.0
    with offset(model, batch, embed) as added:
        value = uniform_start(added, spec.start, generator)
        for step in range(spec.steps):
            added.value = value.detach().requires_grad_()
            with around():
                part = loss(model, batch) / spec.steps
                added.check()
                part.backward()
            total += part.item()
            if step + 1 < spec.steps:
                assert added.value.grad is not None
                value = ascend(value, added.value.grad, spec.rate, added.mask, spec.max_norm)
    return total
