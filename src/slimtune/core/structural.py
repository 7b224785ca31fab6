"""Structural initialisation: a side network cut out of the backbone, row by row and column by column.

One walk through the network carries the set K of hidden dimensions that are kept:

    embedding             K = the d / r dimensions of largest importance
    norms                 w[K]
    q, k, v               columns K; the same rows for all three, by the product of their importances
    o                     columns = those rows; its own most important rows are the new K
    feed-forward network  likewise; up and gate keep the same rows

The importance of a row is the sum over its kept columns of I, the magnitude |W| or the Fisher information
(see `fisher`). Products are sums of logarithms, which do not underflow. Biases follow their rows. Every
sub-layer chooses its own K: the residual stream is not kept aligned.

Source: Sung et al., 2022, arXiv 2206.06522, section 3.3 and appendix. Ours, where the paper's code is T5's
alone: the decoder's walk starts at the embedding again, the columns of its cross-attention's k and v are the
encoder's last K, whose states they read; kept indices ascend; q apart from k and v where key heads are fewer.
"""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy, Tower
from slimtune.core.bound import weight_at
from slimtune.core.init import Init, Params
from slimtune.core.modes import evaluating
from slimtune.core.sideshape import SUBLAYERS, Shape, block_sites, relative_table
from slimtune.core.sites import Site, widths
from slimtune.core.unfreeze import base_parameters, is_frozen_kind
from slimtune.errors import DataError, MethodError

Cut = tuple[Tensor, Tensor | None]
"""Kept rows and, of a matrix, columns."""


@dataclass(frozen=True)
class CopyOf(Init):
    """A tensor that starts as a copy, in the backbone's own precision; nothing of it is kept afterwards."""

    read: Callable[[], Tensor] = lambda: torch.empty(0)

    def make(self, seed: int, key: str, device: torch.device, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
        if device.type == "meta":
            return super().make(seed, key, device, dtype, weight)
        return self.read().detach().to(device=device, dtype=dtype, copy=True)


class Walk:
    """The cuts of a backbone, found at the first tensor that is asked for.

    shapes: the side blocks', by tower and block. importance: of each of the backbone's parameters, by `id`;
    their values by default. official: as the paper's code for T5, which lets the decoder go on from the
    encoder's last K, takes that of the decoder's stream in cross-attention, and does not sort.
    """

    def __init__(self, anatomy: Anatomy, module: Callable[[str], nn.Module], shapes: Mapping[tuple[str, int], Shape],
                 importance: Mapping[int, Tensor] | None = None, official: bool = False) -> None:
        self.anatomy, self.module, self.shapes = anatomy, module, shapes
        self.importance, self.official = importance, official

    def start(self, params: Params, tower: str, block: int | None) -> Params:
        """The same tensors, started from the backbone's where it has them."""
        return {name: CopyOf(init.shape, init.fill, read=self._reader(tower, block, name))
                if self.has(tower, block, name) else init for name, init in params.items()}

    def _reader(self, tower: str, block: int | None, name: str) -> Callable[[], Tensor]:
        return lambda: self.value(tower, block, name)

    def has(self, tower: str, block: int | None, name: str) -> bool:
        """Whether the backbone has a tensor that a side network's starts from."""
        return name == "table" or name.removesuffix("_bias") in self._sites(tower, block)

    def value(self, tower: str, block: int | None, name: str) -> Tensor:
        """A side network's tensor, cut out of the backbone."""
        if name == "table":
            table = relative_table(self.anatomy, self.module, self.anatomy.tower(tower))
            assert table is not None
            return table.weight
        plain = name.removesuffix("_bias")
        site = self._sites(tower, block)[plain]
        rows, columns = self.cuts[tower, block, plain]
        if plain != name:
            bias = self.module(site.path)._parameters["bias"]
            assert bias is not None
            return (bias if site.part is None else bias[slice(*site.part)])[rows]
        weight = self._weight(site)
        return weight[rows] if columns is None else weight[rows][:, columns]

    def _sites(self, tower: str, block: int | None) -> dict[str, Site]:
        if block is None:
            final = [s for s in self.anatomy.sites if s.tower == tower and s.role == "norm.final"]
            return {"norm_top": final[0]} if final else {}
        return block_sites(self.anatomy, tower, block)

    def _weight(self, site: Site, important: bool = False) -> Tensor:
        host = self.module(site.path)
        weight: Any = host._parameters.get("weight")
        if weight is None or is_frozen_kind(weight):
            raise MethodError(f"the side network starts from the weight of {site.name}, which is "
                              f"{'not there' if weight is None else f'quantised ({weight.dtype})'}.",
                              "Set start='random'.")
        if important and self.importance is not None:
            view = self.importance[id(weight)]
            view = view.mT if site.transposed else view
            return view if site.part is None else view[slice(*site.part)]
        return weight_at(host, site).detach()

    # the walk

    @cached_property
    def cuts(self) -> dict[tuple[str, int | None, str], Cut]:
        """Kept rows and columns by tower, block and name; None for the tower's final norm."""
        cuts: dict[tuple[str, int | None, str], Cut] = {}
        ends: dict[str, Tensor] = {}
        for tower in self.anatomy.towers:
            memory = ends.get("encoder") if tower.name == "decoder" else None
            stream = memory if self.official and memory is not None else self._embedding(tower)
            memory = stream if memory is None else memory
            for index in range(len(tower.blocks)):
                stream = self._block(cuts, tower, index, stream, memory)
            ends[tower.name] = stream
            cuts[tower.name, None, "norm_top"] = stream, None
        return cuts

    def _block(self, cuts: dict[tuple[str, int | None, str], Cut], tower: Tower, index: int, stream: Tensor,
               memory: Tensor) -> Tensor:
        """The cuts of one block; the hidden dimensions kept behind it."""
        shape, sites = self.shapes[tower.name, index], block_sites(self.anatomy, tower.name, index)
        for kind in SUBLAYERS:
            if kind != "mlp" and kind not in shape.attention:
                continue
            before = stream
            if kind == "mlp":
                rows = self._rows(cuts, (tower.name, index), sites,
                                  [(n, stream) for n in ("mlp_up", "mlp_gate") if n in sites], shape.hidden)
                out = "mlp_down"
            else:
                rows = self._attention(cuts, (tower.name, index), sites, shape, kind, stream, memory)
                out = f"{kind}_o"
            stream = self._rows(cuts, (tower.name, index), sites, [(out, rows)], shape.width)
            cuts[tower.name, index, f"norm_{kind}"] = (stream if tower.post_norm else before), None
        return stream

    def _attention(self, cuts: dict[tuple[str, int | None, str], Cut], where: tuple[str, int], sites: dict[str, Site],
                   shape: Shape, kind: str, stream: Tensor, memory: Tensor) -> Tensor:
        """The rows of q, which are the columns of o."""
        heads = shape.attention[kind]
        source = stream if kind == "self" or self.official else memory
        q, kv = [(f"{kind}_q", stream)], [(f"{kind}_k", source), (f"{kind}_v", source)]
        if heads.keys == heads.heads:
            return self._rows(cuts, where, sites, q + kv, heads.heads * heads.width)
        self._rows(cuts, where, sites, kv, heads.keys * heads.width)
        return self._rows(cuts, where, sites, q, heads.heads * heads.width)

    def _rows(self, cuts: dict[tuple[str, int | None, str], Cut], where: tuple[str, int], sites: dict[str, Site],
              maps: list[tuple[str, Tensor]], keep: int) -> Tensor:
        """The rows that these maps keep together, given the columns of each."""
        parts = [self._weight(sites[name], important=True)[:, columns].abs() for name, columns in maps]
        score = parts[0].sum(1) if len(parts) == 1 else torch.stack([p.log() for p in parts]).sum(0).logsumexp(1)
        rows = self._largest(score, keep)
        for name, columns in maps:
            cuts[(*where, name)] = rows, columns
        return rows

    def _largest(self, score: Tensor, keep: int) -> Tensor:
        order = score.argsort(descending=True, stable=True)
        if self.official:  # the code takes the difference of two Python sets, and their order
            kept = list(set(range(len(score))) - set(order[keep:].tolist()))
            return torch.tensor(kept, device=score.device)
        return order[:keep].sort().values

    def _embedding(self, tower: Tower) -> Tensor:
        """The kept dimensions of the first block's input: by the embedding, or the projection behind it."""
        shape = self.shapes[tower.name, 0]
        for path in (tower.embed, tower.entry):
            module = self._embeds(path, tower.width)
            if module is not None:
                weight: Any = module.weight
                important = weight.detach() if self.importance is None else self.importance[id(weight)]
                axes = 0 if isinstance(module, nn.Embedding) else tuple(range(1, important.dim()))
                return self._largest(important.abs().sum(axes), shape.width)
        query = block_sites(self.anatomy, tower.name, 0)["self_q"]
        return self._largest(self._weight(query, important=True).abs().sum(0), shape.width)

    def _embeds(self, path: str | None, width: int) -> nn.Module | None:
        module = self.module(path) if path else None
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.dim() < 2 or is_frozen_kind(weight):
            return None
        return module if widths(module)[1] == width else None


# importance


def fisher(model: nn.Module, batches: Iterable[Mapping[str, Any]], samples: int = 1024) -> dict[str, Tensor]:
    """The Fisher information's diagonal, not averaged: the sum over examples of the loss's squared gradient.

        I(W) = sum_n (d loss_n / d W)^2

    One backward for each example. The model runs as it is, in eval mode; its modes, `requires_grad` and
    gradients are then as they were. batches: the model's inputs, labels included.

    Errors: DataError when a batch gives no loss, or there is none.
    Example:
        >>> from slimtune.testing import batch, tiny
        >>> found = fisher(tiny("t5"), [batch("t5")], samples=2)
        >>> found["shared.weight"].shape
        torch.Size([99, 32])
    """
    parameters = {n: p for n, p in base_parameters(model).items() if not is_frozen_kind(p)}
    required = {n: p.requires_grad for n, p in parameters.items()}
    total = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()}
    seen = 0
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with evaluating(model):
            for example in _examples(batches, samples):
                _add_squares(model, example, parameters, total)
                seen += 1
    finally:
        for n, p in parameters.items():
            p.requires_grad_(required[n])
    if not seen:
        raise DataError("the Fisher information needs examples, and there are none.")
    return total


def _add_squares(model: nn.Module, example: dict[str, Any], parameters: dict[str, nn.Parameter],
                 total: dict[str, Tensor]) -> None:
    with torch.enable_grad():
        loss = getattr(model(**example), "loss", None)
        if loss is None:
            raise DataError("the Fisher information needs a loss, and the model gave none.",
                            f"It got: {' '.join(example)}", "Add labels to the batches.")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for n, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            total[n].add_(grad.to(total[n].dtype).square())


def _examples(batches: Iterable[Mapping[str, Any]], samples: int) -> Iterable[dict[str, Any]]:
    """Single examples, each a batch of one."""
    left = samples
    for batch in batches:
        size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
        for i in range(min(size, left)):
            yield {k: v[i:i + 1] if isinstance(v, Tensor) and v.dim() and len(v) == size else v
                   for k, v in batch.items()}
        left -= size
        if left <= 0:
            return
