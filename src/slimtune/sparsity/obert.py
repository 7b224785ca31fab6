"""oBERT: second-order pruning with a Fisher matrix in blocks, which moves the weights that stay.

    F = lambda I + 1/m sum g g^T, in B x B blocks on the diagonal
    F_0^-1 = I / lambda;    F_i^-1 = F_{i-1}^-1 - (F_{i-1}^-1 g)(F_{i-1}^-1 g)^T / (m + g^T F_{i-1}^-1 g)
    S_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q,    which is w_q^2 / (2 [F^-1]_qq) for a single weight
    dw = -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q

A block is B weights that follow one another in the rows of W. Several gradients go into one step of the recursion, by
Woodbury's identity: the same matrix, in fewer passes over memory. The update is that of all weights of a block that go,
together, so that the block's rest is where its quadratic model is least, and what goes is 0 exactly.

Source: Kurtic et al., 2022, "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language
Models", arXiv 2203.07259, equations 4 to 7.
"""
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import Per, gradients, parts, wide
from slimtune.sparsity.moving import need_trained, write
from slimtune.sparsity.target import oriented
from slimtune.sparsity.view import View

TOGETHER = 16
"""Gradients in one step of the recursion."""


@criterion
class OBERT(Criterion):
    """Block-Fisher saliency, and the update of what stays.

    Holds B numbers for each weight, in memory up to `limit` numbers; of a larger model it judges some tensors at a
    time, and reads the data again for the others. group: weights of a row that go together share the saliency of all.
    update=False scores only, so that weights which the delta does not train can be masked as well.

    Errors: MethodError for weights that may not be moved; for rows that do not split into groups.
    """

    needs_data: ClassVar[bool] = True
    changes: ClassVar[bool] = True

    block: int = Field(50, ge=1, description="B")
    group: int = Field(1, ge=1, description="weights that are judged together; divides block")
    gradients: int = Field(1024, ge=1, description="m at most: as many parts of the data are read")
    damp: float = Field(1e-7, gt=0, description="lambda")
    per: Per = Field("batch", description="what one gradient is of")
    update: bool = Field(True, description="move what stays")
    limit: int = Field(2**28, ge=1, description="numbers of F^-1 held at a time")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.block % self.group:
            raise ValueError(f"group={self.group} does not divide block={self.block}")
        return self

    def score(self, view: View) -> dict[str, Tensor]:
        if self.update:
            need_trained(view, "OBERT")
        self._check(view)
        pieces, found = list(self._pieces(view)), {}
        for piece in pieces:
            inverses = self.inverses(piece)
            if self.update and len(pieces) == 1:  # repair reads the same
                view.notes["obert"] = inverses
            for name, inverse in inverses.items():
                w = blocks(oriented(view.weights[name], view.targets[name]), self.block)
                found[name] = self._back(view, name, saliency(w, inverse, self.group))
        return found

    @torch.no_grad()
    def repair(self, view: View, masks: dict[str, Tensor]) -> None:
        if not self.update:
            return
        need_trained(view, "OBERT")
        kept, after = view.notes.pop("obert", None), {}
        for piece in [view] if kept is not None else self._pieces(view):
            for name, inverse in (kept if kept is not None else self.inverses(piece)).items():
                target = view.targets[name]
                w = blocks(oriented(view.weights[name], target), self.block)
                keep = blocks(oriented(masks[name], target).to(w), self.block, 1).bool()
                after[name] = self._back(view, name, moved(w, inverse, keep))
        for name, weight in after.items():  # all gradients are of the weights as they were
            write(view.targets[name], oriented(weight, view.targets[name]))

    @torch.no_grad()
    def inverses(self, view: View) -> dict[str, Tensor]:
        """F^-1 of each target's blocks, by name. A weight that is dead has no part in the others'."""
        every = islice(gradients(view, "OBERT", self.per), self.gradients)
        size = sum(1 for _ in parts(view, "OBERT", self.per))
        m, found = min(size, self.gradients), {}
        for several in iter(lambda: list(islice(every, TOGETHER)), []):
            for name, target in view.targets.items():
                lives = view.masks.get(name)
                rows = [blocks(oriented(g[name] if lives is None else g[name] * lives, target), self.block)
                        for g in several]
                G = torch.stack(rows, 1)
                if name not in found:
                    start = torch.eye(self.block, dtype=G.dtype, device=G.device) / self.damp
                    found[name] = start.repeat(len(G), 1, 1)
                downdate(found[name], G, m)
        return found

    def _pieces(self, view: View) -> Iterator[View]:
        """The view in pieces of which each F^-1 fits into the limit; a tensor is never cut."""
        names: list[str] = []
        held = 0
        for name, target in view.targets.items():
            size = target.parameter.numel() * self.block
            if names and held + size > self.limit:
                yield replace(view, targets={n: view.targets[n] for n in names})
                names, held = [], 0
            names.append(name)
            held += size
        yield replace(view, targets={n: view.targets[n] for n in names})

    def _back(self, view: View, name: str, values: Tensor) -> Tensor:
        """Blocks (N, B) as the target is stored."""
        target = view.targets[name]
        shape = oriented(target.parameter, target).shape
        return oriented(values.flatten()[:target.parameter.numel()].view(shape), target)

    def _check(self, view: View) -> None:
        for name, target in view.targets.items():
            inputs = oriented(target.parameter, target).shape[-1]
            if inputs % self.group:
                raise MethodError(f"OBERT.group={self.group} does not divide the {inputs} inputs of {name}.",
                                  "Choose a group that does.")


def blocks(weight: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """The rows one after the other, cut into blocks, the last one filled up. Shapes: (N, B)."""
    flat = wide(weight).flatten()
    return pad(flat, (0, -flat.numel() % size), value=fill).view(-1, size)


def downdate(inverse: Tensor, G: Tensor, m: int) -> None:
    """F^-1 with more gradients, in place: F^-1 - F^-1 G^T (m I + G F^-1 G^T)^-1 G F^-1.

    With one gradient, k = 1, this is the paper's recursion.
    Shapes: inverse (N, B, B); G (N, k, B).
    """
    P = G @ inverse
    core = P @ G.mT + m * torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    inverse -= P.mT @ torch.linalg.solve(core, P)


def saliency(w: Tensor, inverse: Tensor, group: int = 1) -> Tensor:
    """1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, at each weight of Q. Shapes: w and result (N, B)."""
    if group == 1:
        return w.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
    n, size = w.shape[0], w.shape[1] // group
    own = inverse.view(n, size, group, size, group).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    q = w.view(n, size, group)
    both = (q * torch.linalg.solve(own, q.unsqueeze(-1)).squeeze(-1)).sum(-1) / 2
    return both.repeat_interleave(group, 1)


def moved(w: Tensor, inverse: Tensor, keep: Tensor, at_once: int = 4096) -> Tensor:
    """w + dw for all that goes of a block together: 0 where it does not stay. Shapes: w, keep (N, B)."""
    out = []
    for part in torch.arange(len(w), device=w.device).split(at_once):
        f, x, gone = inverse[part].double(), w[part].double(), (~keep[part]).double()
        system = f * gone.unsqueeze(1) * gone.unsqueeze(2) + torch.diag_embed(1 - gone)
        force = torch.linalg.solve(system, (x * gone).unsqueeze(-1))
        out.append((x - (f @ force).squeeze(-1)).masked_fill(~keep[part], 0).to(w.dtype))
    return torch.cat(out)
