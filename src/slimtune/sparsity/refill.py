"""Refill: make an unstructured mask one of whole output channels, as dense as it was.

    score_i = ||m_i * W_i||_1,   k = floor(|m|_0 / n),   n weights a channel
    the k rows of the highest score live whole, the others not at all
    refill+:  k = floor(|m|_0 / n + (channels - |m|_0 / n) rho)

Other scores are the number of weights that live, and what the channel gives on data (see channels.py).

Values of what is filled in are the caller's: those to rewind to.

Source: Chen et al., 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", arXiv 2202.04736,
section 3.2 and algorithm 2. There k is printed as ceil(s c n); the density that its code keeps is that above.
"""
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from slimtune.core import Delta
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.allocation import lowest
from slimtune.sparsity.channels import Features, channel_scores
from slimtune.sparsity.target import On, Target, oriented, targets
from slimtune.sparsity.view import Batch, View

By = Literal["magnitude", "remain"]


def refill(mask: Tensor, weight: Tensor, *, extra: float = 0.0, by: By = "magnitude", scores: Tensor | None = None,
           compat: Literal["paper", "official"] = "paper") -> Tensor:
    """The mask of whole rows. Of equal scores the later rows live.

    extra: rho of refill+, a share of the channels that would go. by: "magnitude", or "remain", the number of weights
    that live. scores: of the rows, in place of `by`. compat="official": one row more, as the code keeps.

    Shapes: mask, weight and result (d_out, d_in), scores (d_out,). Errors: MethodError for a share outside [0, 1], no
    rows, and a name that no score has.
    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
        >>> refill(mask, torch.tensor([[9.0, 1.0], [1.0, 1.0], [1.0, 5.0], [7.0, 7.0]])).tolist()
        [[True, True], [False, False], [True, True], [False, False]]
    """
    if not 0 <= extra <= 1:
        raise MethodError(f"refill: extra={extra} is a share of the channels that would go.", "Choose it in [0, 1].")
    if mask.dim() < 2:
        raise MethodError(f"refill: a mask of shape {tuple(mask.shape)} has no rows to fill.", "Refill matrices.")
    if by not in get_args(By):
        raise MethodError(f"refill has no by='{by}' without data.", f"There are: {listing(get_args(By))}",
                          suggest(by, get_args(By)))
    rows, exact = mask.shape[0], int(mask.sum()) / mask[0].numel()
    k = math.floor(exact + (rows - exact) * extra + 1e-9) + (compat == "official")
    living = mask.double() if by == "remain" else weight.detach().double().abs() * mask
    keep = lowest(living.flatten(1).sum(1) if scores is None else scores, rows - min(k, rows))
    return keep.reshape(-1, *[1] * (mask.dim() - 1)).expand(mask.shape).clone()


def refill_delta(delta: Delta, *, on: On = "base", sites: Sequence[str] = ("linear",), extra: float = 0.0,
                 by: By | Features = "magnitude", batches: Sequence[Batch] = (),
                 compat: Literal["paper", "official"] = "paper") -> dict[str, Tensor]:
    """Masks of whole rows from those that the delta holds, with the others as they are; nothing is set.

    Rows are scored by what lives, which the delta must hold still. Set the masks, then load the values to rewind to.
    by: as refill's, or of the features that each layer gives on the batches: "features_l1", "features_l2", "saliency".
    Errors: MethodError when none of the targets has a mask, and as refill's and channel_scores'.
    """
    chosen = {n: t for n, t in targets(delta, on, sites).items() if n in delta.masks}
    if not chosen:
        raise MethodError(f"delta '{delta.name}' has no mask to refill.", "Prune it first.")
    scores, options = _scores(delta, chosen, by, batches), {"extra": extra, "compat": compat}
    found = dict(delta.masks)
    for name, target in chosen.items():
        mask, weight = oriented(delta.masks[name], target), oriented(target.parameter.detach(), target)
        new = refill(mask, weight, **options, **scores[name])
        found[name] = oriented(new, target).contiguous()
    return found


def _scores(delta: Delta, chosen: dict[str, Target], by: By | Features,
            batches: Sequence[Batch]) -> dict[str, dict[str, Any]]:
    """How refill is to score each target's rows."""
    if by not in (known := (*get_args(By), *get_args(Features))):
        raise MethodError(f"refill has no by='{by}'.", f"There are: {listing(known)}", suggest(by, known))
    if by in get_args(By):
        return {name: {"by": by} for name in chosen}
    scores = channel_scores(View(delta, chosen, batches), by)  # type: ignore[arg-type]
    return {name: {"scores": score} for name, score in scores.items()}
