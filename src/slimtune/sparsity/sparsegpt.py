"""SparseGPT: prune a linear map column by column, each error made up for by the columns to its right.

    H = 2/n sum x x^T + damp mean(diag H) I;    C the upper Cholesky factor of H^-1:  H^-1 = C^T C
    S_ij = W_ij^2 / C_jj^2
    for each column j:   e = (W_:j - m_:j W_:j) / C_jj,    W_:k -= e C_jk  for k > j

The published algorithm chooses the mask of a block of columns when it comes to it, by S of the weights as they have
become; `solve` does. With a mask that is given, `repair` runs the sweep alone, and S is of the weights as they were: of
columns that could all make up for one another it takes too many at once, and the error is larger.
An input that is always 0 makes no difference: its column becomes 0.

Source: Frantar and Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
2301.00774, algorithm 1 and section 3.
"""
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from slimtune.errors import MethodError
from slimtune.sparsity.calibration import calibrate
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import wide
from slimtune.sparsity.moving import need_trained, write
from slimtune.sparsity.target import oriented
from slimtune.sparsity.view import View

Compat = Literal["paper", "official"]


@criterion
class SparseGPT(Criterion):
    """Optimal brain surgeon on each linear map's own output error.

    sequential: the inputs of a block are those behind the blocks that are pruned already, at the price of a forward
    of all data for each block. update=False scores only, so that weights which the delta does not train can be masked.
    compat="official": floor(s n) + 1 weights go of each block of columns, in place of floor(s n).

    Errors: MethodError for weights that may not be moved, or that are no linear maps of the backbone.
    """

    needs_data: ClassVar[bool] = True
    changes: ClassVar[bool] = True
    allocation: ClassVar[str] = "uniform"

    block: int = Field(128, ge=1, description="columns whose mask is chosen at a time")
    damp: float = Field(0.01, gt=0, description="share of H's mean diagonal added to it")
    sequential: bool = Field(True, description="block after block, with the inputs of the pruned model")
    update: bool = Field(True, description="move what stays")
    compat: Compat = "paper"

    def score(self, view: View) -> dict[str, Tensor]:
        if self.update:
            need_trained(view, "SparseGPT")
        found = {}
        for name, H in hessians(view).items():
            target = view.targets[name]
            W, C, dead = prepared(oriented(view.weights[name], target), H, self.damp)
            found[name] = oriented(W.masked_fill(dead, 0).square() / C.diagonal().square(), target)
        return found

    @torch.no_grad()
    def repair(self, view: View, masks: dict[str, Tensor]) -> None:
        if not self.update:
            return
        need_trained(view, "SparseGPT")
        for name, H in self._each(view):
            target = view.targets[name]
            W, _ = sparsegpt(oriented(view.weights[name], target), H, mask=oriented(masks[name], target),
                             block=self.block, damp=self.damp)
            write(target, W)

    @torch.no_grad()
    def solve(self, view: View, sparsity: float | None = None, pattern: tuple[int, int] | None = None
              ) -> dict[str, Tensor]:
        """Masks of a sparsity, or of n of each m inputs, chosen along the sweep; the weights are moved as well."""
        need_trained(view, "SparseGPT")
        masks = {}
        for name, H in self._each(view):
            target = view.targets[name]
            held = view.masks.get(name)
            W, mask = sparsegpt(oriented(view.weights[name], target), H, sparsity=sparsity, pattern=pattern,
                                held=None if held is None else oriented(held, target), block=self.block,
                                damp=self.damp, compat=self.compat)
            write(target, W)
            masks[name] = oriented(mask, target)
        return masks

    def _each(self, view: View) -> Iterator[tuple[str, Tensor]]:
        """H of each target, in the order of the model; later ones read what was written before."""
        if not self.sequential:
            yield from hessians(view).items()
            return
        blocks: dict[tuple[object, ...], list[str]] = {}
        for name, target in view.targets.items():
            blocks.setdefault(tuple((s.tower, s.block) for s in target.sites[:1]), []).append(name)
        for names in blocks.values():
            yield from hessians(replace(view, targets={n: view.targets[n] for n in names})).items()


def hessians(view: View) -> dict[str, Tensor]:
    """2/n sum x x^T of what enters each target, over the n tokens of the data."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def take(name: str, x: Tensor) -> None:
        rows = wide(x)
        total[name] = total[name].addmm_(rows.mT, rows) if name in total else rows.mT @ rows
        count[name] = count.get(name, 0) + len(rows)

    calibrate(view, "SparseGPT", take)
    return {name: 2 / count[name] * total[name] for name in view.targets}


def prepared(W: Tensor, H: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """(a wide copy of W, C, which inputs are dead); those have H_jj = 1 before the mean is taken."""
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.to(H.dtype))
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return wide(W).clone(), torch.linalg.cholesky(inverse, upper=True), dead
    except torch.linalg.LinAlgError:
        raise MethodError("SparseGPT: the second moments of a layer's inputs cannot be factored.",
                          "Raise damp, or give more data. Are the model's hidden states finite?") from None


def sparsegpt(W: Tensor, H: Tensor, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None,
              mask: Tensor | None = None, held: Tensor | None = None, block: int = 128, damp: float = 0.01,
              compat: Compat = "paper") -> tuple[Tensor, Tensor]:
    """(W', mask): prune one matrix to a sparsity, to n of each m inputs that live, or by a mask.

    held: which weights live before; the others stay dead. block: columns of which a sparsity's mask is chosen at a
    time, over all rows together.

    Shapes: W, mask and held (d_out, d_in); H (d_in, d_in).
    Errors: MethodError unless one of sparsity, pattern and mask is given; for m that does not divide d_in.

    Example:
        >>> W = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> sparsegpt(W, torch.eye(4), sparsity=0.5)[0]
        tensor([[ 0., -3.,  2.,  0.]])
    """
    if sum(given is not None for given in (sparsity, pattern, mask)) != 1:
        raise MethodError("SparseGPT takes one of sparsity, pattern and mask.", "Give a sparsity from 0 to below 1.")
    n, m = pattern or (0, 1)
    if pattern is not None and (not 0 < n < m or W.shape[1] % m):
        raise MethodError(f"{n}:{m} does not fit a matrix of {W.shape[1]} inputs.", "Choose n < m and m that divides.")
    W, C, dead = prepared(W, H, damp)
    W[:, dead] = 0
    keep = torch.ones_like(W, dtype=torch.bool) if mask is None else mask.clone()
    lives = torch.ones_like(keep) if held is None else held
    diag, width = C.diagonal().square(), max(block // m, 1) * m
    for start in range(0, W.shape[1], width):
        stop = min(start + width, W.shape[1])
        if sparsity is not None:
            keep[:, start:stop] = _lowest(W, diag, lives, start, stop, sparsity, compat)
        errors = torch.zeros_like(W[:, start:stop])
        for j in range(start, stop):
            if pattern is not None and (j - start) % m == 0:
                keep[:, j:j + m] = _largest(_scores(W, diag, lives, j, j + m), n) & lives[:, j:j + m]
            e = errors[:, j - start] = (W[:, j] * ~keep[:, j]) / C[j, j]
            W[:, j + 1:stop] -= e[:, None] * C[j, j + 1:stop]
            W[:, j].masked_fill_(~keep[:, j], 0)
        W[:, stop:] -= errors @ C[start:stop, stop:]
    return W, keep


def _scores(W: Tensor, diag: Tensor, lives: Tensor, start: int, stop: int) -> Tensor:
    return (W[:, start:stop].square() / diag[start:stop]).masked_fill(~lives[:, start:stop], -torch.inf)


def _lowest(W: Tensor, diag: Tensor, lives: Tensor, start: int, stop: int, sparsity: float, compat: Compat) -> Tensor:
    """The mask of a block without its lowest scores."""
    scores = _scores(W, diag, lives, start, stop)
    k = int(round(sparsity * scores.numel(), 9)) + (compat == "official")
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=W.device)
    keep[scores.flatten().argsort(stable=True)[:k]] = False
    return keep.view_as(scores) & lives[:, start:stop]


def _largest(scores: Tensor, n: int) -> Tensor:
    """True for the n largest of each row; of equal ones, the later."""
    order = scores.sort(dim=1, stable=True).indices[:, scores.shape[1] - n:]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
