"""Stream: the residual stream that all blocks of a tower read and write, and the norms that it passes.

A hidden dimension is one of its d numbers. Where every read of the stream, or every write, passes a norm, what the
norms let through is all that any weight sees of it: one coefficient a dimension, at every norm, gates the whole width.
The norm of what lives is that over the living alone, as if the others had never been there:

    y = c * (gamma * (x - mean_K(x)) / sqrt(var_K(x) + eps) + beta),    K = {j: c_j != 0}

Over all d, zeros included, mean and variance would be others, and no norm of |K| numbers computes those; this one is
a plain norm of the model without the other dimensions.

Source: of norms over the kept dimensions, the official code of Xia, Zhong, Chen, 2022, "Structured Pruning Learns
Compact and Accurate Models", arXiv 2204.00408, section 3.1 (z_hidden).
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimtune.core.affine import vector
from slimtune.core.anatomy import Anatomy, Tower
from slimtune.core.sites import Site, join
from slimtune.core.unfreeze import base_modules
from slimtune.errors import MethodError

BESIDE = ("rel_embeddings",)
"""Modules that attention reads at the stream's width, though they are no part of it (DeBERTa's relative positions)."""
INSTEAD = "Prune heads and neurons instead."


def stream_norms(anatomy: Anatomy) -> list[Site]:
    """The norms of a backbone whose stream is read, or written, through them alone, in the model's order.

    Errors: MethodError for any other backbone, with the reason.
    Example:
        >>> from slimtune.core.anatomy import dissect
        >>> from slimtune.testing import tiny
        >>> [site.name for site in stream_norms(dissect(tiny("gpt2", n_layer=1)))]
        ['decoder.0.norm.attn', 'decoder.0.norm.mlp', 'decoder.norm.final']
    """
    norms = [s for s in anatomy.sites if s.role.startswith("norm.")]
    if why := _unfit(anatomy, norms):
        raise MethodError(f"hidden dimensions of {anatomy.model_type} cannot be gated: {why}.", INSTEAD)
    return norms


def _unfit(anatomy: Anatomy, norms: list[Site]) -> str | None:
    tower, *others = anatomy.towers
    if anatomy.guessed:
        return "its roles were guessed"
    if others:
        return f"it has {len(anatomy.towers)} towers, whose streams share tables or read each other"
    if tower.grid:
        return "its stages have different widths"
    if len({s.d_in for s in norms}) != 1:
        return f"its norms have widths {sorted({s.d_in for s in norms})}, so no one stream passes them all"
    return _missing(anatomy, tower, {(s.block, s.role) for s in norms})


def _missing(anatomy: Anatomy, tower: Tower, norms: set[tuple[int | None, str]]) -> str | None:
    """The norm that the stream does not pass: of each sub-layer that is there, and at the end that is bare."""
    reads = {(s.block, f"norm.{s.role.partition('.')[0]}") for s in anatomy.sites if s.role in ("attn.q", "mlp.up")}
    ends = (None, "norm.embed" if tower.post_norm else "norm.final")
    lost = sorted(f"{role} of block {block}" for block, role in reads - norms) or (
        [] if ends in norms else [f"{ends[1]} of the {tower.name}"])
    return f"there is no {lost[0]}, through which the stream would pass" if lost else None


def check_stream(module: Callable[[str], nn.Module], anatomy: Anatomy) -> None:
    """Errors: MethodError where a module reads the stream's width beside its norms, or a norm of unknown kind."""
    norms = {site.path: site for site in stream_norms(anatomy)}
    width = next(iter(norms.values())).d_in
    for path in norms:
        is_centred(module(path))
    for path, found in base_modules(module(anatomy.base)):
        full, weight = join(anatomy.base, path), found._parameters.get("weight")
        name = path.rpartition(".")[2]
        odd = "Norm" in type(found).__name__ and full not in norms and weight is not None and weight.shape == (width,)
        if odd or name in BESIDE:
            raise MethodError(f"hidden dimensions of {anatomy.model_type} cannot be gated: {full} has the stream's "
                              "width, and is none of the norms that it passes.", INSTEAD)


def is_centred(norm: nn.Module) -> bool:
    """Whether a norm takes the mean off. Errors: MethodError for a kind that is not known."""
    name = type(norm).__name__
    if isinstance(norm, nn.LayerNorm):
        return True
    if name.endswith("RMSNorm") or name == "T5LayerNorm":
        return False
    raise MethodError(f"hidden dimensions cannot be gated: {name} is no norm that is known.", INSTEAD)


def over_living(norm: Callable[[Tensor], Tensor], centred: bool, bias: Tensor | None, c: Tensor, x: Tensor) -> Tensor:
    """A norm over the dimensions whose coefficient is not 0, times the coefficients; see the module.

    The norm of all d runs on x with the mean of the living in the place of the dead, or 0 where it takes no mean
    off, scaled so that its variance is theirs, which stretches what it gives by the same. While all live it runs on
    x itself, and the result is the same bits.

    Shapes: x (..., T, d); c (d), or (B, d) with a coefficient an example; bias (d).
    Example:
        >>> x, c = torch.randn(2, 5, 8), torch.tensor([1., 0, 2, 0, 1, 1, 0, 1])
        >>> y = over_living(nn.LayerNorm(8), True, torch.zeros(8), c, x)[..., c != 0]
        >>> bool(torch.allclose(y, c[c != 0] * nn.LayerNorm(5)(x[..., c != 0]), atol=1e-5))
        True
    """
    alive = vector((c != 0).to(x.dtype), x)
    count = alive.sum(-1, keepdim=True).clamp(min=1)
    rest = (x * alive).sum(-1, keepdim=True) / count if centred else x.new_zeros(())
    stretch = (x.shape[-1] / count).sqrt()
    y = norm(torch.where(alive != 0, x, rest) * stretch) / stretch
    return vector(c, y) * (y if bias is None else y + (1 - 1 / stretch) * bias)
