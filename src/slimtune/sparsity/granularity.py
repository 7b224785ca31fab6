"""Granularity: the units that live or die together.

    element    single weights        block    rows x columns of them        row, column    of a matrix
    n:m        n of each m weights that follow one another along the input
    whole      a tensor: with gates, all heads or all neurons of a layer
    layer      a whole block: with gates, all its heads and neurons
    rank       row j of A and column j of B, of a delta's low-rank pair

Every unit has one score, `how` of its weights' (mean, sum or max).

Source: of n:m, Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv
2102.04010, section 3.
"""
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from slimtune.core.method import explain
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.target import Target, oriented

Targets = Mapping[str, Target]


class Granularity(BaseModel):
    """Units of weights. `pool` gives a score for each unit, `expand` a mask of the weights from one of units.

    Shapes: weights (d_out, d_in), whatever way they are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def pool(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return {name: self.units(s, name) for name, s in scores.items()}

    def expand(self, keep: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        shapes = {name: tuple(oriented(t.parameter, t).shape) for name, t in targets.items()}
        return {name: self.weights(k, shapes[name]) for name, k in keep.items()}

    def units(self, score: Tensor, name: str) -> Tensor:
        raise NotImplementedError

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error) from None


How = Literal["mean", "sum", "max"]


def _pooled(score: Tensor, dims: tuple[int, ...], how: How) -> Tensor:
    return score.amax(dims) if how == "max" else score.mean(dims) if how == "mean" else score.sum(dims)


class Element(Granularity):
    """Single weights."""

    def units(self, score: Tensor, name: str) -> Tensor:
        return score

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep


class Block(Granularity):
    """Blocks of `rows` outputs and `columns` inputs. Errors: MethodError for a matrix that they do not divide."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    how: How = "mean"

    def units(self, score: Tensor, name: str) -> Tensor:
        if score.dim() != 2 or score.shape[0] % self.rows or score.shape[1] % self.columns:
            raise MethodError(f"blocks of {self.rows} x {self.columns} do not divide {name}, which is "
                              f"{' x '.join(map(str, score.shape))}.", "Choose sizes that do, or fewer sites.")
        out, inner = score.shape[0] // self.rows, score.shape[1] // self.columns
        return _pooled(score.reshape(out, self.rows, inner, self.columns), (1, 3), self.how)

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


class Row(Granularity):
    """All that enters one output."""

    how: How = "mean"

    def units(self, score: Tensor, name: str) -> Tensor:
        return score if score.dim() == 1 else _pooled(score.flatten(1), (1,), self.how)

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


class Column(Granularity):
    """All that one input enters."""

    how: How = "mean"

    def units(self, score: Tensor, name: str) -> Tensor:
        return _pooled(score, (0,), self.how)

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep.expand(shape).clone()


class Whole(Granularity):
    """A whole tensor: of gates, all heads of a layer, or all its neurons."""

    how: How = "mean"

    def units(self, score: Tensor, name: str) -> Tensor:
        return _pooled(score.reshape(-1), (0,), self.how).reshape(1)

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep.reshape([1] * len(shape)).expand(shape).clone()


class Layer(Granularity):
    """All that stands in one block of a tower: of gates, its heads and its neurons.

    Errors: MethodError for a target that stands in no block.
    """

    how: How = "mean"

    def pool(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        layers: dict[str, list[Tensor]] = {}
        for name, score in scores.items():
            layers.setdefault(_layer(name, targets), []).append(score.reshape(-1))
        return {layer: _pooled(torch.cat(own), (0,), self.how).reshape(1) for layer, own in layers.items()}

    def expand(self, keep: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return {name: keep[_layer(name, targets)].reshape([1] * t.parameter.dim()).expand(
            oriented(t.parameter, t).shape).clone() for name, t in targets.items()}


def _layer(name: str, targets: Targets) -> str:
    blocks = {(site.tower, site.block) for site in targets[name].sites}
    if len(blocks) != 1 or None in next(iter(blocks)):
        raise MethodError(f"granularity 'layer': {name} stands in no one block.", "Prune gates, or the base.")
    return ".".join(map(str, *blocks))


class NM(Granularity):
    """n of each m weights along the input live: the sparsity is 1 - n / m, and no allocation decides it.

    Errors: MethodError for a matrix whose inputs m does not divide.
    """

    n: int = Field(2, ge=1)
    m: int = Field(4, ge=2)

    def units(self, score: Tensor, name: str) -> Tensor:
        if score.shape[-1] % self.m or self.n >= self.m:
            raise MethodError(f"{self.n}:{self.m} does not fit {name}, which has {score.shape[-1]} inputs.",
                              "Choose n < m and an m that divides them.")
        return score

    def keep(self, score: Tensor) -> Tensor:
        """The mask: of equal scores the later ones live, as everywhere."""
        groups = score.reshape(-1, self.m)
        order = groups.sort(dim=1, stable=True).indices
        keep = torch.zeros_like(groups, dtype=torch.bool)
        keep.scatter_(1, order[:, self.m - self.n:], True)
        return keep.reshape(score.shape)

    def weights(self, keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep


class Rank(Granularity):
    """Row j of A with column j of B: whole ranks of a delta's low-rank pairs.

    Errors: MethodError for a target that is neither.
    """

    how: How = "mean"

    def pool(self, scores: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        pairs: dict[str, Tensor] = {}
        for name, score in scores.items():
            slot, _, part = name.rpartition(".")
            if part not in ("A", "B") or score.dim() != 2:
                raise MethodError(f"granularity 'rank': {name} is neither A nor B of a low-rank pair.",
                                  "Prune a delta of LoRA or its kin, with on='delta'.")
            own = _pooled(score, (1,) if part == "A" else (0,), self.how)
            pairs[slot] = pairs[slot] + own if slot in pairs else own
        return pairs

    def expand(self, keep: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        found = {}
        for name, target in targets.items():
            slot, _, part = name.rpartition(".")
            units = keep[slot]
            found[name] = (units[:, None] if part == "A" else units).expand(target.parameter.shape).clone()
        return found


GRANULARITIES: dict[str, type[Granularity]] = {
    "element": Element, "block": Block, "row": Row, "column": Column, "whole": Whole, "layer": Layer, "nm": NM,
    "rank": Rank}


def as_granularity(given: "Granularity | str | dict[str, Any]") -> Granularity:
    """A granularity from itself, its name, `2:4`, or its name and values as recipes state them."""
    if isinstance(given, Granularity):
        return given
    values = dict(given) if isinstance(given, dict) else {"name": given}
    name = str(values.pop("name", ""))
    if ":" in name and all(part.isdigit() for part in name.split(":", 1)):
        n, m = name.split(":", 1)
        return NM(**{"n": int(n), "m": int(m), **values})
    if name not in GRANULARITIES:
        raise MethodError(f"no granularity is named '{name}'.", f"There are: {listing(GRANULARITIES)}, and 2:4",
                          suggest(name, GRANULARITIES))
    return GRANULARITIES[name](**values)
