"""Calibration: what enters each linear map, of real tokens only."""
from collections.abc import Callable

import torch
from torch import Tensor

from slimtune.sparsity.target import Target
from slimtune.sparsity.view import Batch, View


@torch.no_grad()
def calibrate(view: View, who: str, take: Callable[[str, Tensor], None]) -> None:
    """Call take(name, x) with what enters each target on all the data, padding left out. Shapes: x (tokens, d_in)."""
    masks: dict[str, Tensor | None] = {}

    def real(name: str, x: Tensor) -> None:
        mask = masks[name]
        take(name, x[mask.to(x.device)] if mask is not None and mask.numel() == x.shape[0] else x)

    with view.open(), torch.no_grad(), view.inputs(real):
        for batch in view.data(who):
            masks |= {name: real_tokens(view, target, batch) for name, target in view.targets.items()}
            view.model(**batch)


def real_tokens(view: View, target: Target, batch: Batch) -> Tensor | None:
    """Which rows of a map's input are tokens and no padding, flat; None where all are, as for images.

    A decoder beside an encoder has its own tokens: those of `decoder_attention_mask`, else those with a label. Its
    cross-attention reads keys and values of the encoder's.
    """
    site = target.sites[0] if target.sites else None
    if site is None or site.tower == "vision":
        return None
    mask = batch.get("attention_mask")
    own = site.tower == "decoder" and any(t.name == "encoder" for t in view.delta.anatomy.towers)
    if own and not (site.cross and site.role in ("attn.k", "attn.v")):
        labels = batch.get("labels")
        mask = batch.get("decoder_attention_mask", None if labels is None else labels != -100)
    return mask.flatten().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
