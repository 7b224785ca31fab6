"""Replay: a forward in which the frozen blocks answer from memory, and all the rest runs as it is.

    h_i  <-  the state kept of this batch,    i below the cut (see cut.py)

A stub stands in a block's place as an attribute of the instance: the model's own forward still makes masks,
positions, norms and head, and hooks on the block still run.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD, first, thread
from slimtune.core.modes import evaluating

Feed: TypeAlias = Callable[[str, Tensor], Tensor]
"""(name of a state, the block's input) -> the state of the batch that runs. Shapes: both (B, T, d)."""
Place: TypeAlias = int | str | None
"""Where in its own call a block finds what it returns beside the state: by position, by name, or None for nothing."""


@dataclass(frozen=True)
class Stub:
    """How one frozen block answers.

    tap: the name of the state it answers with; None passes its input on.
    beside: for each further item of the tuple it returns, where that comes from; None returns the state alone.
    runs: it makes what later blocks need (T5's position bias), and is run for that.
    """

    path: str
    tap: str | None
    beside: tuple[Place, ...] | None
    runs: bool


@dataclass(frozen=True)
class Cut:
    """Where the frozen part of a model ends, for one delta.

    quiet: the modules of the frozen part, by path, which run in eval mode. towers, dtypes, widths: of each state.
    """

    stubs: tuple[Stub, ...]
    quiet: tuple[str, ...]
    towers: dict[str, str]
    dtypes: dict[str, torch.dtype]
    widths: dict[str, int]

    @property
    def taps(self) -> dict[str, str]:
        """{name of a state, such as encoder.11: path of the block that it is the output of}."""
        return {stub.tap: stub.path for stub in self.stubs if stub.tap is not None}


class Replay:
    """The stubs of one model, to be entered for each batch: `with replay(feed): model(**batch).loss.backward()`.

    Inside, the frozen blocks answer with what `feed` gives, in the thread that entered; the frozen part is in eval
    mode, whatever train() says, and the rest in the mode it is in. Nothing of it stays afterwards.
    """

    def __init__(self, model: nn.Module, stubs: Sequence[Stub], quiet: Sequence[str] = ()) -> None:
        self.model = model
        self.blocks = [(model.get_submodule(stub.path), stub) for stub in stubs]
        frozen = [*map(model.get_submodule, quiet), *(m for block, _ in self.blocks for m in _inside(block))]
        self.quiet = list({id(module): module for module in frozen}.values())

    @contextmanager
    def __call__(self, feed: Feed) -> Iterator[None]:
        woken: list[nn.Module] = []

        def hush(model: nn.Module, args: Any) -> None:  # as late as this: a trainer calls train() at each step
            found = [module for module in self.quiet if module.training]
            for module in found:
                module.training = False
            woken.extend(found)

        with ExitStack() as stack:
            stack.callback(lambda: [setattr(module, "training", True) for module in woken])
            for block, stub in self.blocks:
                stack.enter_context(_overridden(block, _answer(block, stub, feed)))
            stack.callback(self.model.register_forward_pre_hook(hush).remove)
            yield


def _inside(block: nn.Module) -> Iterator[nn.Module]:
    """A block and what is in it, but for ours: a side network's dropout is its own."""
    return (module for path, module in block.named_modules() if CHILD not in path.split("."))


def _answer(block: nn.Module, stub: Stub, feed: Feed) -> Callable[..., Any]:
    real, owner = block.forward, thread()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if thread() != owner:
            return real(*args, **kwargs)
        h = first(args, kwargs)
        if stub.runs:
            with torch.no_grad():
                beside = real(*args, **kwargs)[1:]
        else:
            beside = tuple(None if p is None else args[p] if isinstance(p, int) else kwargs[p]
                           for p in stub.beside or ())
        state = h if stub.tap is None else feed(stub.tap, h)
        return state if stub.beside is None else (state, *beside)

    return forward


@contextmanager
def _overridden(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(block)
    before = own.get("forward")  # accelerate, for one, sets its own
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


class _Enough(Exception):  # noqa: N818
    """All states of a batch are there: the rest of the forward is not needed."""


def states(delta: Delta, cut: Cut, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The kept states of a batch, as the plain backbone makes them in eval mode; the forward ends with the last.

    Shapes: each (B, T, d).
    """
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = out[0] if isinstance(out, tuple) else out
            if len(found) == len(cut.taps):
                raise _Enough
        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(delta.model))
        stack.enter_context(delta.disabled())
        stack.enter_context(torch.no_grad())
        for name, path in cut.taps.items():
            stack.callback(delta.model.get_submodule(path).register_forward_hook(note(name)).remove)
        with suppress(_Enough):
            delta.model(**batch)
    return found
