"""Averaging deltas: one delta whose every number is a weighted sum of the same number of others.

    theta = sum_t w_t theta_t

For tensors of the backbone it is the differences that are summed: theta = theta_0 + sum_t w_t (theta_t - theta_0).
"""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD
from slimtune.core.mask import set_masks
from slimtune.core.method import to_config
from slimtune.core.switch import deltas, set_active
from slimtune.errors import DeltaError, listing, suggest


@torch.no_grad()
def average(model: nn.Module, weights: Mapping[str, float], name: str) -> Delta:
    """A new delta on the model, the weighted sum of attached ones of the same methods.

    One delta of weight 1 gives that delta, bitwise. The sum is of parameters; to sum what the deltas do instead,
    which is exact for methods that are not linear in their parameters, see `activate(..., weights=...)`.

    Of a masked tensor lives what lives in one of them.
    Errors: DeltaError for an unknown name, deltas of other methods than the first's, or labels or masks of the backbone
    that differ.
    Example:
        >>> from slimtune.methods import IA3
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> a, b = attach(model, IA3(), name="a"), attach(model, IA3(), name="b")
        >>> mix = average(model, {"a": 0.5, "b": 0.5}, "mix")
        >>> mix.name
        'mix'
    """
    parts = _parts(model, weights)
    lead = parts[0][0]
    root = model._modules[CHILD]
    before = root.plan.active, root.plan.weights  # type: ignore[union-attr]
    bases = {own.key: own.base for own in lead.owned if own.base.shape == own.value.shape}  # a head of other labels
    states = [(d.state(), w) for d, w in parts]
    mixed = {key: _sum(key, [(s[key], w) for s, w in states], bases.get(key)) for key in states[0][0]}
    delta = attach(model, lead.methods, name, seed=lead.seed, anatomy=lead.anatomy, state=mixed, labels="own")
    if masks := _masks(parts):
        set_masks(delta, masks)
    delta.info = dict(lead.info)
    set_active(root, *before)  # type: ignore[arg-type]
    return delta


def _parts(model: nn.Module, weights: Mapping[str, float]) -> list[tuple[Delta, float]]:
    found = deltas(model)
    if not weights:
        raise DeltaError("average got no deltas.", f"There are: {listing(found) or 'none'}")
    for name in weights:
        if name not in found:
            raise DeltaError(f"no delta named '{name}' is attached.", f"There are: {listing(found) or 'none'}",
                             suggest(name, found))
    parts = [(found[name], float(weight)) for name, weight in weights.items()]
    lead = parts[0][0]
    configs = [to_config(m) for m in lead.methods]
    for delta, _ in parts[1:]:
        if [to_config(m) for m in delta.methods] != configs:
            raise DeltaError(f"deltas '{lead.name}' and '{delta.name}' are of other methods or settings, so their "
                             "numbers do not correspond.", "Use activate(..., weights=...), which sums what they do.")
        if delta.info.get("labels") != lead.info.get("labels") or _heads(delta) != _heads(lead):
            raise DeltaError(f"deltas '{lead.name}' and '{delta.name}' have other labels, so their heads do not "
                             "correspond.", "Use activate(..., weights=...).")
        if not _same(_below(delta), _below(lead)):
            raise DeltaError(f"deltas '{lead.name}' and '{delta.name}' mask the backbone otherwise, so they do not "
                             "stand on the same weights.", "Give both the same masks: see Delta.set_masks.")
    return parts


def _masks(parts: list[tuple[Delta, float]]) -> dict[str, Tensor]:
    lead = parts[0][0]
    names = [name for name in lead.masks if all(name in d.masks for d, _ in parts)]
    return {n: torch.stack([d.masks[n].to(lead.masks[n].device) for d, _ in parts]).any(0) for n in names}


def _below(delta: Delta) -> dict[str, Tensor]:
    """Its masks of the backbone that it does not train."""
    return {own.key: delta.masks[own.key] for own in delta.owned if own.group == "pruned"}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(m, two[n].to(m.device)) for n, m in one.items())


def _heads(delta: Delta) -> dict[str, torch.Size]:
    return {own.path: own.value.shape for own in delta.owned if own.group == "head"}


def _sum(key: str, values: list[tuple[Tensor, float]], base: Tensor | None) -> Tensor:
    first = values[0][0]
    if len(values) == 1 and values[0][1] == 1.0:
        return first.clone()
    if not first.is_floating_point():  # constants, such as a support
        if any(not torch.equal(first, v) for v, _ in values):
            raise DeltaError(f"{key} is a constant that differs between the deltas, so their sum has no such form.",
                             "Use activate(..., weights=...), which sums what they do.")
        return first.clone()
    zero = torch.zeros_like(first, dtype=torch.float64) if base is None else base.detach().double()
    start = torch.zeros_like(zero) if base is None else zero
    total = start.clone()
    for value, weight in values:
        total += weight * (value.double() - zero)
    return total.to(first.dtype)
