"""Sublayer: an attention or a feed-forward network as the stream sees it, run as far as it and no further.

    r -> [norm] -> ... -> x -> y = W x + b -> [r + y] -> z

x enters the output map, r is the stream before the sub-layer, and z what the next norm reads.
"""
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core import Anatomy, Delta, Site
from slimtune.sparsity.structure import OUT, tied
from slimtune.sparsity.target import Target
from slimtune.sparsity.view import Batch

CLOSE = 1e-2
"""Of its norm, how far z may be from r + y, which rounding of bfloat16 allows and scales do not."""


@dataclass(frozen=True)
class Sublayer:
    """out: the site of the output map. before: the module whose input is r; after: that whose input is z."""

    out: Site
    before: str | None
    after: str | None


@dataclass
class Seen:
    """x (tokens, d_in), y, r and z (tokens, d), all tokens; r and z where they were found."""

    found: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        return self.found[name].reshape(-1, self.found[name].shape[-1])

    @property
    def adds_up(self) -> bool:
        """Whether the stream behind is that before and the output, number for number."""
        if len({self.found[n].shape if n in self.found else None for n in ("r", "y", "z")}) > 1:
            return False
        return bool((self.z - self.r - self.y).norm() <= CLOSE * self.z.norm())


class _Far(Exception):  # noqa: N818
    """All is seen."""


def sublayer(delta: Delta, gate: Target) -> Sublayer:
    """The sub-layer whose heads or neurons a gate scales."""
    at, anatomy = gate.sites[0], delta.anatomy
    maps = tied(delta, gate)
    norms = _norms(anatomy, at)
    role = "norm.mlp" if at.role == "mlp.act" else "norm.cross" if at.cross else "norm.attn"
    own = next((i for i, s in enumerate(norms) if (s.block, s.role) == (at.block, role)), None)
    before = after = None
    if own is not None and anatomy.tower(at.tower).post_norm:
        before, after = next((s.path for s in maps if s.role in ("attn.q", "mlp.up")), None), norms[own].path
    elif own is not None:
        before, after = norms[own].path, norms[own + 1].path if own + 1 < len(norms) else None
    return Sublayer(next(s for s in maps if s.role in OUT), before, after)


def _norms(anatomy: Anatomy, at: Site) -> list[Site]:
    """The norms of a tower that the stream passes, in order."""
    order = ("norm.attn", "norm.cross", "norm.mlp", "norm.final")
    own = [s for s in anatomy.sites if s.tower == at.tower and s.role in order]
    last = len(anatomy.tower(at.tower).blocks)
    return sorted(own, key=lambda s: (last if s.block is None else s.block, order.index(s.role)))


@torch.no_grad()
def run(model: nn.Module, batch: Batch, layer: Sublayer) -> Seen:
    """Run the model until all of a sub-layer is seen."""
    seen = Seen()
    wanted = {"x", "y", *(["r"] if layer.before else []), *(["z"] if layer.after else [])}

    def take(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name not in seen.found:
            seen.found[name] = value.detach().clone()  # the model may go on in place
        if wanted <= seen.found.keys():
            raise _Far

    def entering(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: take(name, next(iter((*args, *kwargs.values())), None))

    with ExitStack() as stack:
        for name, path in (("x", layer.out.path), ("r", layer.before), ("z", layer.after)):
            if path is not None:
                hook = model.get_submodule(path).register_forward_pre_hook(entering(name), with_kwargs=True)
                stack.callback(hook.remove)
        stack.callback(model.get_submodule(layer.out.path).register_forward_hook(lambda _, __, y: take("y", y)).remove)
        stack.enter_context(suppress(_Far))
        model(**batch)
    return seen
