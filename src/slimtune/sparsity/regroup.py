"""Regroup: make an unstructured mask one of dense blocks, each of some rows and some columns wherever these stand.

    similar(i, j) = |m_i and m_j|_0 / |m_i or m_j|_0                     (Jaccard)
    rows that are alike form a group; the columns that enough of them have are its block; what is outside goes
    again on what is left, until no block is found

so that a layer runs as a few small dense products:  y[rows_g] += W[rows_g, columns_g] x[columns_g].

Source: Chen et al., 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", arXiv 2202.04736,
section 3.3 and algorithm 3. The paper partitions a hypergraph with hMETIS, a binary; here rows are grouped greedily
about the fullest one that is left, which is deterministic and finds planted blocks exactly (a deviation).
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.core import Delta
from slimtune.errors import MethodError
from slimtune.sparsity.target import On, oriented, targets

PASSES = 3
"""Times that a group's rows are chosen anew about its columns."""


@dataclass(frozen=True)
class Group:
    """A dense block: its rows and columns. Shapes: rows (r), columns (c), ascending."""

    rows: Tensor
    columns: Tensor

    @property
    def macs(self) -> int:
        """Multiply-adds for one token."""
        return self.rows.numel() * self.columns.numel()


def jaccard(mask: Tensor, other: Tensor) -> Tensor:
    """The share of columns that two rows have in common, of those that either has; 0 for two empty rows.

    Shapes: mask (R, C), other (S, C); result (R, S).

    Example:
        >>> a = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]).bool()
        >>> b = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]).bool()
        >>> jaccard(a, b).item()
        0.375
    """
    a, b = mask.float(), other.float()
    both = a @ b.mT
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def regroup(mask: Tensor, *, groups: int = 8, rows: int = 8, columns: int = 8, share: float = 0.5,
            similar: float = 0.1) -> list[Group]:
    """The blocks of a mask; none where nothing in it is alike, and the mask then stays as it is.

    groups: t1, how many groups the rows are divided into at most, of about R / groups rows each. rows, columns: b1 and
    b2, the least of a block. share: t2, of a group's rows that must have a column. similar: the least likeness of a row
    to its group.

    Shapes: mask (R, C), bool. Errors: MethodError for thresholds that make no sense.
    """
    if mask.dim() != 2 or min(groups, rows, columns) < 1 or not 0 < share <= 1 or not 0 < similar <= 1:
        raise MethodError(f"regroup: a mask of shape {tuple(mask.shape)}, groups={groups}, rows={rows}, "
                          f"columns={columns}, share={share}, similar={similar}.",
                          "A matrix, whole numbers from 1, and shares in (0, 1] make sense.")
    left, found = mask.clone(), []
    size = max(-(-mask.shape[0] // groups), rows)
    while True:
        new = [block for group in _partition(left, size, similar)
               if (block := _block(left, group, rows, columns, share)) is not None]
        if not new:
            return found
        for block in new:
            left[block.rows[:, None], block.columns] = False
        found += new


def _partition(mask: Tensor, size: int, similar: float) -> list[Tensor]:
    """Groups of like rows, each about the fullest row that is in none yet."""
    free, found = mask.any(1), []
    while bool(free.any()):
        centre = mask[int((mask.sum(1) * free).argmax())][None]
        chosen = torch.empty(0, dtype=torch.long)
        for _ in range(PASSES):
            likeness = jaccard(mask, centre)[:, 0].masked_fill(~free, -1)
            order = likeness.argsort(descending=True, stable=True)[:size]
            chosen = order[likeness[order] >= similar]
            if not len(chosen):
                break
            majority = mask[chosen].float().mean(0) >= 0.5
            if not bool(majority.any()) or torch.equal(majority[None], centre):
                break
            centre = majority[None]
        if not len(chosen):  # alike to nobody
            chosen = (mask.sum(1) * free).argmax()[None]
        free[chosen] = False
        found.append(chosen.sort().values)
    return found


def _block(mask: Tensor, group: Tensor, rows: int, columns: int, share: float) -> Group | None:
    if len(group) < rows:
        return None
    chosen = (mask[group].float().mean(0) >= share).nonzero().squeeze(1)
    return Group(group, chosen) if len(chosen) >= columns else None


def filled(groups: Sequence[Group], mask: Tensor) -> Tensor:
    """The mask of the blocks; the mask itself where there is none. Shapes: as the mask."""
    if not groups:
        return mask.clone()
    found = torch.zeros_like(mask)
    for group in groups:
        found[group.rows[:, None], group.columns] = True
    return found


def regroup_delta(delta: Delta, *, on: On = "base", sites: Sequence[str] = ("linear",), groups: int = 8, rows: int = 8,
                  columns: int = 8, share: float = 0.5, similar: float = 0.1) -> dict[str, Tensor]:
    """Masks of dense blocks from those that the delta holds, with the others as they are; nothing is set.

    A mask in which no block is found stays. Set the masks, then load the values to rewind to. Other arguments: those of
    `regroup`. Errors: MethodError when none of the targets has a mask.
    """
    chosen = {n: t for n, t in targets(delta, on, sites).items() if n in delta.masks}
    if not chosen:
        raise MethodError(f"delta '{delta.name}' has no mask to regroup.", "Prune it first.")
    found = dict(delta.masks)
    for name, target in chosen.items():
        mask = oriented(delta.masks[name], target)
        blocks = regroup(mask, groups=groups, rows=rows, columns=columns, share=share, similar=similar)
        found[name] = oriented(filled(blocks, mask), target).contiguous()
    return found


class GroupLinear(nn.Module):
    """A linear map of dense blocks: columns gathered, a small product for each block, rows scattered.

    Equal to y = (m * W) x + b with m = filled(groups) but for the order of sums. Executed multiply-adds: sum r c.

    Shapes: weight (d_out, d_in); x (..., d_in); y (..., d_out).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: Sequence[Group]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.macs = sum(group.macs for group in groups)
        self.weights, seen = nn.ParameterList(), torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        for i, group in enumerate(groups):
            at = group.rows[:, None], group.columns
            self.weights.append(nn.Parameter(weight.detach()[at].masked_fill(seen[at], 0)))  # blocks may overlap
            seen[at] = True
            self.register_buffer(f"rows_{i}", group.rows)
            self.register_buffer(f"columns_{i}", group.columns)

    def forward(self, x: Tensor) -> Tensor:
        y = (x[..., :1] * 0).expand(*x.shape[:-1], self.out_features)  # of x, also where there is no group
        if self.bias is not None:
            y = y + self.bias
        for i, weight in enumerate(self.weights):
            y = y.index_add(-1, self.get_buffer(f"rows_{i}"), x[..., self.get_buffer(f"columns_{i}")] @ weight.mT)
        return y
