"""Hidden: dimensions of the residual stream, sliced out of all that writes or reads it.

    writers   rows of attn.o and mlp.down, columns of embeddings, channels of patches, learned tokens and positions
    between   norms, with the gates folded in, and scales of sub-layers
    readers   columns of attn.q, attn.k, attn.v, mlp.up and mlp.gate, and of heads behind the last norm

In a block the anatomy knows them. Behind it a reader is found by running: a linear map whose input is nan at exactly
the dimensions that were made nan behind the last norm. What a reader gives has a width of its own and keeps it, as
BERT's pooler does.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core import Anatomy, Delta, Site, join
from slimtune.core.merge import wide
from slimtune.core.sites import LINEAR
from slimtune.core.stream import check_stream, is_centred, over_living, stream_norms
from slimtune.core.unfreeze import base_modules, base_parameters, places_of
from slimtune.errors import MethodError
from slimtune.sparsity.edits import Edits
from slimtune.sparsity.parts import Constant, Silent
from slimtune.sparsity.probe import outputs
from slimtune.sparsity.slicing import SHARED, TABLES
from slimtune.sparsity.structure import OUT
from slimtune.sparsity.target import hidden_gates

MAPS = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")
Ties = list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]


def coefficients(model: nn.Module, anatomy: Anatomy, active: Sequence[Delta], wanted: Tensor | None) -> Tensor | None:
    """The coefficient of each hidden dimension, by all gates and by what is asked for; None where there is neither.

    Errors: MethodError for a backbone whose stream cannot be gated, or when no dimension would be left.
    """
    gates = [target.parameter.detach() for delta in active for target in hidden_gates(delta).values()]
    if wanted is not None:
        check_stream(model.get_submodule, anatomy)
        gates.append(wanted.to(next(model.parameters()).device))
    if not gates:
        return None
    c = torch.ones_like(gates[0], dtype=torch.float32)
    for gate in gates:
        c = c * gate
    if not bool((c != 0).any()):
        raise MethodError(f"shrink would leave no hidden dimension of the {anatomy.towers[0].name}.",
                          "Keep at least one.")
    return c


@contextmanager
def only(model: nn.Module, anatomy: Anatomy, c: Tensor | None) -> Iterator[None]:
    """The model with these coefficients at all norms, whatever gates run there, by hooks."""
    with ExitStack() as stack:
        for site in stream_norms(anatomy) if c is not None else ():
            norm = model.get_submodule(site.path)
            stack.callback(norm.register_forward_hook(_gated(c)).remove)  # type: ignore[arg-type]
        yield


def _gated(c: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda norm, args, out: over_living(norm.forward, is_centred(norm), norm._parameters.get("bias"),
                                               c.to(args[0].dtype), args[0])


def cut_hidden(edits: Edits, model: nn.Module, anatomy: Anatomy, c: Tensor, inputs: Mapping[str, Any] | Tensor) -> None:
    """Fold the coefficients into the norms, and slice the stream to the dimensions whose are not 0.

    inputs: a batch by which readers behind the blocks are found.
    Errors: MethodError for a tensor that is tied to one of another meaning, or a reader that is no linear map.
    """
    norms, kept = stream_norms(anatomy), c.nonzero().flatten()
    readers = {} if len(kept) == len(c) else _readers(model, anatomy, c, inputs)
    ties: Ties = [(getattr(*found[0]), found) for found in
                  places_of(model, {id(p) for p in base_parameters(model).values()}).values() if len(found) > 1]
    for path in dict.fromkeys(site.path for site in norms):
        _norm(edits, model.get_submodule(path), c, kept)
    if len(kept) == len(c):
        return
    maps = {site.path: site for site in anatomy.sites if site.role in LINEAR}
    for path, site in maps.items():
        (edits.rows if site.role in OUT else edits.columns)(model.get_submodule(path), kept)
    for path, times in readers.items():
        edits.columns(model.get_submodule(path), torch.cat([kept + i * len(c) for i in range(times)]))
    done = {*maps, *readers, *(site.path for site in norms)}
    for path, module in base_modules(model.get_submodule(anatomy.base)):
        if (full := join(anatomy.base, path)) not in done:
            _other(edits, module, full, anatomy.towers[0].embed, len(c), kept)
    _tie(edits, ties)


def _norm(edits: Edits, norm: nn.Module, c: Tensor, kept: Tensor) -> None:
    for name in ("weight", "bias"):
        if (value := norm._parameters.get(name)) is not None:
            edits.tensor(norm, name, (wide(value) * c)[kept].to(value.dtype))
    if len(kept) < len(c) and hasattr(norm, "normalized_shape"):
        edits.attribute(norm, "normalized_shape", (len(kept),))


def _other(edits: Edits, module: nn.Module, path: str, embed: str, width: int, kept: Tensor) -> None:
    """Slice what stands in a backbone beside linear maps and norms; parts of an earlier shrink too."""
    if isinstance(module, nn.Embedding):
        if module.embedding_dim == width and not set(path.split(".")) & set(SHARED):
            _take(edits, module, "weight", 1, kept)
            edits.attribute(module, "embedding_dim", len(kept))
    elif path == embed:
        for name in ("weight", "bias"):
            _take(edits, module, name, 0, kept)
        edits.attribute(module, "out_channels", len(kept))
    elif isinstance(module, Constant | Silent):
        name = "out_features" if isinstance(module, Constant) else "width"
        if getattr(module, name) == width:
            _take(edits, module, "bias", 0, kept)
            edits.attribute(module, name, len(kept))
    elif type(module).__name__ in MAPS:  # no map that is left reads the stream there, but one without outputs
        weight = module._parameters["weight"]
        if weight is not None and weight.numel() == 0 and width in weight.shape:
            edits.columns(module, kept)
    elif not isinstance(module, nn.Conv2d):
        for name, p in list(module._parameters.items()):
            if p is not None and p.dim() and p.shape[-1] == width and name not in TABLES:
                _take(edits, module, name, p.dim() - 1, kept)


def _take(edits: Edits, module: nn.Module, name: str, axis: int, kept: Tensor) -> None:
    if (value := module._parameters.get(name)) is not None:
        edits.tensor(module, name, value.index_select(axis, kept.to(value.device)))


def _tie(edits: Edits, ties: Ties) -> None:
    """Let tied tensors be one again."""
    for old, places in ties:
        now = [module._parameters[name] for module, name in places]
        if all(p is old for p in now):
            continue
        if odd := [m for (m, _), p in zip(places, now, strict=True) if p is old]:
            raise MethodError(f"hidden dimensions cannot be cut: the weight of a {type(odd[0]).__name__} "
                              f"{tuple(old.shape)} is tied to the embeddings, and reads another space than the stream.",
                              "Load the model without this head, or prune heads and neurons instead.")
        for module, name in places[1:]:
            edits.parameter(module, name, now[0])  # type: ignore[arg-type]


def _readers(model: nn.Module, anatomy: Anatomy, c: Tensor, inputs: Mapping[str, Any] | Tensor) -> dict[str, int]:
    """The linear maps behind the last norm that read the stream, and how many copies of it side by side."""
    dead, found = c == 0, dict[str, int]()
    inside = {site.path for site in anatomy.sites if site.role in LINEAR}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            lost = args[0].isnan() if args else dead.new_zeros(1)
            times, rest = divmod(lost.shape[-1], len(c))
            if not rest and times and bool((lost == dead.to(lost.device).repeat(times)).all()):
                found[path] = times
        return look

    with ExitStack() as stack:
        for site in _last(anatomy):
            norm = model.get_submodule(site.path)
            stack.callback(norm.register_forward_hook(
                lambda m, a, out: out.masked_fill(dead.to(out.device), torch.nan)).remove)
        for path, module in base_modules(model):
            if type(module).__name__ in MAPS and path not in inside:
                stack.callback(module.register_forward_pre_hook(watch(path)).remove)
        outputs(model, inputs)
    return found


def _last(anatomy: Anatomy) -> list[Site]:
    """The norm that the stream passes last."""
    norms = stream_norms(anatomy)
    return [s for s in norms if s.role == "norm.final"] or [s for s in norms if s.block is not None][-1:]
