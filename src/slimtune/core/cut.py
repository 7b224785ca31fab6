"""Cut: where a delta's frozen part ends, and which of its hidden states are read. The model itself is asked.

    h_i is frozen  if no trained tensor is in its graph, nor in those before it
    h_i is read    if a NaN in its place reaches the loss: by a head, a side network, the next block

So one rule covers heads, side networks, methods on the last blocks, and an encoder-decoder's decoder behind a
trained encoder.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD
from slimtune.core.modes import evaluating
from slimtune.core.replay import Cut, Place, Replay, Stub
from slimtune.errors import DeltaError, MethodError, listing


@dataclass
class _Call:
    """What was seen of one block in one forward. before: how many frozen modules had ended by then."""

    out: Tensor
    frozen: bool
    beside: tuple[Place, ...] | None
    makes: bool
    before: int
    times: int = 1


@dataclass
class _Seen:
    """The blocks' calls by path, and the modules that ended, in order, with nothing trained behind them."""

    calls: dict[str, _Call] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


def cut(delta: Delta, batch: Mapping[str, Any]) -> Cut:
    """Where the delta's frozen part ends, by a few forwards of a batch; one example with its labels is enough.

    Errors: MethodError when no block is frozen; DeltaError when the delta does not run alone.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), LoRA(rank=2, blocks=(-1,)))
        >>> cut(delta, batch("bert")).taps
        {'encoder.0': 'bert.encoder.layer.0'}
    """
    if delta.root.plan.active != (delta.name,):
        raise DeltaError(f"delta '{delta.name}' does not run alone: active are {listing(delta.root.plan.active)}.",
                         "Call activate() on it first.")
    seen, towers = _watch(delta, batch), delta.anatomy.towers
    depths = {tower.name: _depth(tower, seen.calls) for tower in towers}
    stubs = [stub for tower in towers for stub in _stubs(tower, depths[tower.name], seen.calls)]
    if not stubs:
        kinds = " + ".join(type(m).__name__ for m in delta.methods)
        raise MethodError(f"{kinds} trains below or inside the first block of every tower of "
                          f"{delta.anatomy.model_type}: no hidden state stays the same that could be kept.",
                          "A feature cache is of use for heads (LinearProbe), side networks (LST), and methods on the "
                          "last blocks (PartialK, or LoRA with blocks=(-1,)).")
    # a tower may hold dropout of its own beside its modules', as BART's does
    last = max(seen.calls[stub.path].before for stub in stubs)
    quiet = tuple(dict.fromkeys([*seen.ended[:last], *(t.path for t in towers if depths[t.name])]))
    outs = {str(stub.tap): seen.calls[stub.path].out.detach() for stub in stubs}
    read = {name: out for name, out in outs.items() if _is_read(name, outs, delta.model, stubs, batch)}
    odd = next((name for name, out in read.items() if out.dim() != 3), None)
    if odd is not None:
        raise MethodError(f"the state {odd} of {delta.anatomy.model_type} has shape {tuple(outs[odd].shape)}.",
                          "Only states of (examples, tokens, width) can be kept.")
    return Cut(tuple(replace(stub, tap=stub.tap if stub.tap in read else None) for stub in stubs), quiet,
               {name: name.rpartition(".")[0] for name in read}, {name: out.dtype for name, out in read.items()},
               {name: out.shape[-1] for name, out in read.items()})


def _depth(tower: Tower, calls: Mapping[str, _Call]) -> int:
    """How many of a tower's first blocks are frozen. One that runs several times has several states."""
    for index, path in enumerate(tower.blocks):
        call = calls.get(path)
        if call is None or call.times > 1 or not call.frozen:
            return index
    return len(tower.blocks)


def _stubs(tower: Tower, depth: int, calls: Mapping[str, _Call]) -> Iterator[Stub]:
    """Stubs of a tower's first blocks; each answers with its own state until it is known whether that is read."""
    for index, path in enumerate(tower.blocks[:depth]):
        yield Stub(path, f"{tower.name}.{index}", calls[path].beside, calls[path].makes and depth < len(tower.blocks))


def _is_read(name: str, outs: Mapping[str, Tensor], model: nn.Module, stubs: list[Stub],
             batch: Mapping[str, Any]) -> bool:
    replay = Replay(model, stubs)
    with evaluating(model), torch.no_grad():
        with replay(lambda tap, h: torch.full_like(outs[tap], torch.nan) if tap == name else outs[tap].clone()):
            out = model(**batch)
    loss = getattr(out, "loss", None)
    return any(bool(t.isnan().any()) for t in _tensors(out if loss is None else loss) if t.is_floating_point())


def _watch(delta: Delta, batch: Mapping[str, Any]) -> _Seen:
    """One forward in eval mode, with a graph: what each block returns, before our hooks on it, and all modules."""
    model, seen = delta.model, _Seen()
    trained, clean = {id(p) for p in model.parameters() if p.requires_grad}, set()

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            state, beside = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            places, makes = _places(args, kwargs, beside or ())
            times = 1 + (seen.calls[path].times if path in seen.calls else 0)
            seen.calls[path] = _Call(state, not _trains(out, trained, clean), None if beside is None else places, makes,
                                     len(seen.ended), times)
        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not _trains(out, trained, clean):
                seen.ended.append(path)
        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        for path, module in model.named_modules():
            if CHILD not in path.split("."):
                stack.callback(module.register_forward_hook(end(path)).remove)
        for path in (path for tower in delta.anatomy.towers for path in tower.blocks):
            block = model.get_submodule(path)
            stack.callback(block.register_forward_hook(note(path), prepend=True, with_kwargs=True).remove)
        model(**batch)
    return seen


def _places(args: tuple[Any, ...], kwargs: Mapping[str, Any], items: tuple[Any, ...]) -> tuple[tuple[Place, ...], bool]:
    """Where in its call a block found what it returns, and whether it made a tensor of it itself."""
    given = [*enumerate(args), *kwargs.items()]
    places = tuple(next((place for place, value in given if item is not None and value is item), None)
                   for item in items)
    return places, any(isinstance(item, Tensor) and place is None for item, place in zip(items, places, strict=True))


def _trains(value: Any, trained: set[int], clean: set[Any]) -> bool:
    """Whether a trained tensor is in the graph of a value. clean: nodes known to have none below, kept for the next.

    requires_grad would not do: for gradient checkpointing, inputs of frozen blocks are told to require one.
    """
    found, nodes = set(), [t.grad_fn for t in _tensors(value) if t.grad_fn is not None]
    if any(id(t) in trained for t in _tensors(value)):
        return True
    while nodes:
        node: Any = nodes.pop()
        if node in found or node in clean:
            continue
        if id(getattr(node, "variable", None)) in trained:
            return True
        found.add(node)
        nodes += [below for below, _ in node.next_functions if below is not None]
    clean |= found
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
