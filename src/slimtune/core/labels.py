"""Tasks whose heads have other numbers of labels than the model: which tensors may differ, and what runs then.

A row of a batch has the logits of its own labels; those that its task does not have are the dtype's least number, so
softmax gives them 0 and the rest is as alone:

    z_i in R^{K_i}  ->  [z_i, min, ..., min] in R^{max K}

A model counts the labels of its own config when it makes a loss, so it is not asked for one where they differ.
"""
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.insert import CHILD, Root, named, thread
from slimtune.core.unfreeze import Owned
from slimtune.errors import DeltaError

IGNORED = -100
Labels: TypeAlias = Literal["model", "own"]
"""Whose number of labels a delta's head should have: the model's, or any, which is then its own."""


def expected(model: nn.Module, places: Iterable[tuple[nn.Module, str]], given: Tensor, base: Tensor) -> torch.Size:
    """The shape a head's tensor should have: the base's, with any number of rows in the map that gives the logits."""
    own = getattr(getattr(model, "config", None), "num_labels", None)
    logits = all(isinstance(m, nn.Linear) and m.out_features == own for m, _ in places)
    return torch.Size((given.shape[0], *base.shape[1:])) if logits and given.dim() > 0 and len(given) else base.shape


def check_labels(owned: Iterable[Owned]) -> bool:
    """Whether these tensors have other labels than the model. Errors: DeltaError where a weight and its bias differ."""
    found: dict[int, set[int]] = {}
    other = False
    for own in owned:
        other = other or own.value.shape != own.base.shape
        for module, _ in own.places:
            if isinstance(module, nn.Linear):
                found.setdefault(id(module), set()).add(own.value.shape[0])
    if other and any(len(sizes) > 1 for sizes in found.values()):
        raise DeltaError("the weight and the bias of a head have different numbers of labels.", "Nothing was loaded.")
    return other


def refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Before the model's forward: no loss by the model where the labels are not those it counts."""
    root = model._modules.get(CHILD)
    if kwargs is None or not isinstance(root, Root) or not (args[1:] or kwargs.get("labels") is not None) or named(
            model, args, kwargs).get("labels") is None:
        return
    route = root.plan.routes.get(thread())
    if route is None:
        owned = [own for name in root.plan.active for own in root.deltas[name].owned]
        if any(own.value.shape != own.base.shape for own in owned):
            raise DeltaError("the active delta's head has another number of labels than the model.",
                             "Call the model without labels, and take the loss of its logits.")
    elif route.widths:
        raise DeltaError("the tasks of this route have other numbers of labels than the model.",
                         "Call the model without labels; `with route(...) as run`, then run.losses(logits, labels).")


def stacked(row: Sequence[Tensor]) -> Tensor:
    """The tensors of the examples' tasks as one, (B, max K, ...), with zeros for labels that a task does not have."""
    most = max(value.shape[0] for value in row)
    return torch.stack([F.pad(v, (0, 0) * (v.dim() - 1) + (0, most - v.shape[0])) for v in row])


def masked(function: Callable[..., Tensor], widths: Sequence[int]) -> Callable[..., Tensor]:
    """A head's forward with the least number where an example's task has no label. Shapes: result (B, ..., max K)."""
    absent = torch.arange(max(widths)) >= torch.tensor(widths)[:, None]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        out = function(*args, **kwargs)
        rows = absent.to(out.device).repeat_interleave(out.shape[0] // len(widths), 0)
        return out.masked_fill(rows.view(len(rows), *[1] * (out.dim() - 2), -1), torch.finfo(out.dtype).min)

    return forward


def losses(logits: Tensor, labels: Tensor, widths: Sequence[int]) -> Tensor:
    """The loss of each example by its own task's labels; see Route.losses."""
    if labels.shape != logits.shape[:-1] or len(widths) != len(logits):
        raise DeltaError(f"the route has {len(widths)} tasks, logits are {tuple(logits.shape)} and labels "
                         f"{tuple(labels.shape)}.", "Give the logits of one call, and one label for each of them.")
    logits = logits.float() if logits.element_size() < 4 else logits
    count = torch.tensor(widths, device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    number = count == 1
    classes = labels.long().where(~number, 0)
    wrong = ((classes < 0) & (classes != IGNORED)) | (classes >= count)
    if bool(wrong.any()):
        row = int(wrong.flatten(1).any(1).nonzero()[0] if wrong.dim() > 1 else wrong.nonzero()[0])
        raise DeltaError(f"example {row} has a label that its task, of {widths[row]} labels, does not have.",
                         "Number the labels of each task from 0.")
    each = F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none", ignore_index=IGNORED)
    each = torch.where(number, (logits[..., 0] - labels.to(logits.dtype)).square(), each)
    return each if each.dim() == 1 else each.flatten(1).sum(1) / (classes != IGNORED).flatten(1).sum(1).clamp_min(1)
