"""Threshold: what lives is what scores above a bar, which the schedule raises; the sparsity follows.

    m = [sigma(S) > tau(t)],    tau(t) = tau (1 - (1 - clip((t - t0) / (t1 - t0), 0, 1))^3)
    lambda(t) = lambda tau(t) / tau

and at least a share `least` of each tensor's units, those of the largest S. It is the allocation of soft movement: the
penalty lambda(t) mean sigma(S) presses scores below the bar, so that each matrix finds its own sparsity.

Source: Sanh, Wolf, Rush, 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, soft movement
pruning; of tau(t), lambda(t) and `least`, the code of Lagunas et al., 2021, "Block Pruning For Faster Transformers",
arXiv 2109.04838.
"""
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slimtune.sparsity.movement import soft_masks


class Threshold(BaseModel):
    """tau: the bar on sigma(S) that the schedule rises to. least, compat: see `soft_masks`.

    Example:
        >>> import torch
        >>> Threshold(tau=0.4, least=0.0).keep({"w": torch.tensor([-5.0, 0.0, 5.0])})["w"].tolist()
        [False, True, True]
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tau: float = Field(gt=0, lt=1, description="sigma(S) of what lives is above it in the end")
    least: float = Field(0.005, ge=0, le=1, description="share of each tensor that lives in any case")
    compat: Literal["paper", "official"] = Field("paper", description="how `least` is made whole; see soft_masks")

    def keep(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of units of these scores."""
        return soft_masks(scores, self.tau, least=self.least, compat=self.compat)

    def at(self, tau: float) -> "Threshold":
        """The same with the bar where the schedule has it."""
        return self.model_copy(update={"tau": tau})
