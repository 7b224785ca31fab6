"""The mean class token of each class, at every block: a start for prompts."""
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.insert import first
from slimtune.core.modes import evaluating
from slimtune.errors import DataError


@torch.no_grad()
def class_means(model: nn.Module, tower: Tower, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """The means of the first token at each block's input and, last, behind the last block; in eval mode.

    batches: the model's inputs, with labels 0 to K - 1. Shapes: (L + 1, K, d).

    Errors: DataError without labels, or when a class up to the largest has no example.
    Example:
        >>> from slimtune.core import dissect
        >>> from slimtune.testing import batch, tiny
        >>> model = tiny("vit")
        >>> class_means(model, dissect(model).tower("vision"), [batch("vit")]).shape
        torch.Size([3, 3, 32])
    """
    seen: list[Tensor] = []
    blocks = [model.get_submodule(path) for path in tower.blocks]
    handles = [b.register_forward_pre_hook(lambda m, a, k: seen.append(first(a, k)[:, 0]), with_kwargs=True)
               for b in blocks]
    handles.append(blocks[-1].register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[:, 0])))
    tokens, labels = [], []
    try:
        with evaluating(model):
            for batch in batches:
                if not isinstance(given := batch.get("labels"), Tensor) or given.dim() != 1:
                    raise DataError("the classes' means need one label an example, and a batch has none.",
                                    f"It has: {' '.join(batch)}", "Add labels to the batches.")
                seen.clear()
                model(**batch)
                tokens.append(torch.stack(seen))
                labels.append(given)
    finally:
        for handle in handles:
            handle.remove()
    return _means(tokens, labels)


def _means(tokens: list[Tensor], labels: list[Tensor]) -> Tensor:
    if not labels:
        raise DataError("the classes' means need examples, and there are none.")
    every, classes = torch.cat(tokens, 1), torch.cat(labels)
    counts = classes.bincount()
    if not bool(counts.all()):
        raise DataError(f"the classes' means need examples of each class, and {int((counts == 0).sum())} of "
                        f"{len(counts)} have none.", "Give calibrate() more of the data.")
    every = every.to(torch.promote_types(every.dtype, torch.float32))  # a sum of ones in bfloat16 ends at 256
    total = every.new_zeros(every.shape[0], len(counts), every.shape[-1])
    return total.index_add_(1, classes, every) / counts[:, None]
