"""Movement: a weight that training moves away from 0 matters, one that it moves towards 0 does not.

    a = (W * M(S)) x;    dL/dS = dL/dW' * W,  W' = W * M    (straight through M)
    S <- S - rate * (dL/dW' * W + lambda d penalty / dS)

    hard    M = the largest S, by allocation and schedule; lambda = 0
    soft    M = [sigma(S) > tau]; penalty = the mean of sigma(S) over a matrix, then over the attention's matrices and
            over the others, and the sum of both

Large S is kept, not large |S|. A block of weights has one S, whose gradient is the sum over the block.

Source: Sanh, Wolf, Rush, 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, equations 3 to
5; of blocks, Lagunas et al., 2021, "Block Pruning For Faster Transformers", arXiv 2109.04838, section 3.
"""
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from slimtune.errors import MethodError
from slimtune.sparsity.criterion import criterion
from slimtune.sparsity.gradients import wide
from slimtune.sparsity.observe import Observing
from slimtune.sparsity.target import Target, oriented
from slimtune.sparsity.view import View

Step = Literal["sgd", "adam"]
BETAS, EPS = (0.9, 0.999), 1e-8


@criterion
class Movement(Observing):
    """Scores that follow -dL/dW' * W while the weights train; see Observing for how.

    rows, columns: of the block that shares a score, in (d_out, d_in); 0 for all of them. neurons: in the feed-forward
    network one score for each neuron instead: a row of up and gate, a column of down. What is no matrix, as gates, has
    a score for each of its numbers.
    step="sgd" is the equation; the published runs take "adam", which soft movement needs, for tau is compared with
    sigma(S) and so the scale of S counts. strength: lambda; 0 is hard movement.

    Errors: MethodError before the first backward pass, and for matrices that do not split into the blocks.
    """

    allocation: ClassVar[str] = "uniform"

    rate: float = Field(1e-2, gt=0, description="learning rate of S")
    step: Step = Field("sgd", description="how S follows its gradient")
    strength: float = Field(0.0, ge=0, description="lambda of the mean of sigma(S)")
    rows: int = Field(1, ge=0, description="of a block; 0 for all")
    columns: int = Field(1, ge=0, description="of a block; 0 for all")
    neurons: bool = Field(False, description="one score a neuron of the feed-forward network")

    @torch.no_grad()
    def observe(self, view: View, gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor],
                strength: float | None = None) -> None:
        """Take in one backward pass. strength: lambda of this step, where a schedule moves it."""
        self._need(view, gradients, weights)
        kept, shares = self._kept(view), _shares(view.targets)
        now = self.strength if strength is None else strength
        for name, target in view.targets.items():
            pooled = self._pool(wide(gradients[name]) * wide(weights[name]), name, target)
            if name not in kept:
                kept[name] = torch.zeros_like(pooled)
            score = kept[name]
            if now:
                alive = score.sigmoid()
                pooled = pooled + now * shares[name] / score.numel() * alive * (1 - alive)
            score -= self.rate * (_adam(kept, name, pooled) if self.step == "adam" else pooled)

    def score(self, view: View) -> dict[str, Tensor]:
        kept = self._kept(view)
        if missing := [name for name in view.targets if name not in kept]:
            raise MethodError(f"Movement has seen no gradient of {missing[0]}.",
                              "It learns while the weights train: call observe(view, gradients, weights) after each "
                              "backward pass, with the same view.")
        return {name: self._spread(kept[name], target) for name, target in view.targets.items()}

    def penalty(self, view: View) -> float:
        """What the soft form adds to the loss, at lambda = 1."""
        kept, shares = self._kept(view), _shares(view.targets)
        return float(sum(shares[name] * kept[name].sigmoid().mean() for name in view.targets))

    def _size(self, target: Target) -> tuple[int, int]:
        out, inner = oriented(target.parameter, target).shape
        role = target.sites[0].role if target.sites else ""
        if self.neurons and role.startswith("mlp."):
            return (out, 1) if role == "mlp.down" else (1, inner)
        return self.rows or out, self.columns or inner

    def _pool(self, value: Tensor, name: str, target: Target) -> Tensor:
        if value.dim() != 2:
            return value
        rows, columns = self._size(target)
        value = oriented(value, target)
        if value.shape[0] % rows or value.shape[1] % columns:
            raise MethodError(f"Movement: blocks of {rows} x {columns} do not divide {name}, which is "
                              f"{' x '.join(map(str, value.shape))}.", "Choose sizes that do, or fewer sites.")
        return value.reshape(value.shape[0] // rows, rows, value.shape[1] // columns, columns).sum((1, 3))

    def _spread(self, score: Tensor, target: Target) -> Tensor:
        if target.parameter.dim() != 2:
            return score
        rows, columns = self._size(target)
        return oriented(score.repeat_interleave(rows, 0).repeat_interleave(columns, 1), target)


def soft_masks(scores: Mapping[str, Tensor], tau: float, *, least: float = 0.005,
               compat: Literal["paper", "official"] = "paper") -> dict[str, Tensor]:
    """[sigma(S) > tau] of each tensor, and at least its `least` share of largest scores.

    compat="official": int(least n) + 1 of them, in place of int(least n), and none where all scores are equal.

    Example:
        >>> soft_masks({"w": torch.tensor([-5.0, 0.0, 5.0])}, tau=0.6)["w"].tolist()
        [False, False, True]
    """
    found = {}
    for name, score in scores.items():
        flat = score.flatten()
        keep = flat.sigmoid() > tau
        few = int(least * flat.numel()) + (compat == "official")
        if compat == "official" and bool((flat == flat[0]).all()):
            few = 0
        keep[flat.argsort(descending=True, stable=True)[:few]] = True
        found[name] = keep.view_as(score)
    return found


def _shares(targets: Mapping[str, Target]) -> dict[str, float]:
    """1 over the number of matrices of a target's kind: the attention's, or the others."""
    kinds = {name: any(s.role.startswith("attn.") for s in t.sites) for name, t in targets.items()}
    return {name: 1 / list(kinds.values()).count(kind) for name, kind in kinds.items()}


def _adam(kept: dict[str, Tensor], name: str, g: Tensor) -> Tensor:
    """Adam's step, its moments kept beside the score."""
    if f"m:{name}" not in kept:
        kept |= {f"m:{name}": torch.zeros_like(g), f"v:{name}": torch.zeros_like(g), f"t:{name}": torch.zeros(())}
    m, v, t = (kept[f"{what}:{name}"] for what in ("m", "v", "t"))
    t += 1
    m.lerp_(g, 1 - BETAS[0])
    v.lerp_(g.square(), 1 - BETAS[1])
    return m / (1 - BETAS[0] ** t.item()) / ((v / (1 - BETAS[1] ** t.item())).sqrt() + EPS)
