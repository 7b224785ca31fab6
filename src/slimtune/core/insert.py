"""Insertion: hooks that find a delta's parameters under their host module, and one pointer to switch.

A host (any module of the backbone) gets one child, `slimtune`, an `Insert`; it holds the slots of
every delta that stands there. The hooks are plain functions that reach everything through the host,
so deepcopy, pickling, gradient checkpointing and sharding see ordinary modules. Which deltas run is
one tuple in the plan that all inserts of a model share: a switch walks nothing.
"""
import inspect
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimtune.core.anatomy import Anatomy
from slimtune.core.slot import Slot
from slimtune.errors import MethodError

CHILD = "slimtune"
LOCK = RLock()
"""Held while deltas come, go and are switched, and while a route opens and closes."""


class Plan:
    """What every insert of one model shares: the names of the active deltas, in order.

    weights: the share of each, when they are averaged and not stacked; examples: how many there are in the batch,
    while gradients of each are taken (see examples.py); routes: what each thread has open (see route.py).
    `carry` holds what a side network or a prompt hands from one hook to the next, by thread.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}
        self.examples: int | None = None
        self.routes: dict[int, Any] = {}
        self.carry: dict[tuple[int, str], Any] = {}

    def put(self, key: str, value: Any) -> None:
        self.carry[thread(), key] = value

    def take(self, key: str, default: Any = None) -> Any:
        return self.carry.pop((thread(), key), default)

    def peek(self, key: str, default: Any = None) -> Any:
        return self.carry.get((thread(), key), default)


class Insert(nn.Module):
    """The child of a host: slots by delta name, registered as `<delta>:<number>`."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.groups: dict[str, tuple[Slot, ...]] = {}
        self.stash: dict[tuple[int, str], Tensor] = {}
        self.feeds: tuple[tuple[Insert, str], ...] = ()

    def add(self, name: str, slot: Slot) -> None:
        group = self.groups.get(name, ())
        self.groups[name] = (*group, slot)
        slot.__dict__["home"] = self
        self._modules[f"{name}:{len(group)}"] = slot

    def rename(self, name: str, new: str) -> None:
        for number, slot in enumerate(self.groups.get(name, ())):
            del self._modules[f"{name}:{number}"]
            self._modules[f"{new}:{number}"] = slot
        if name in self.groups:
            self.groups[new] = self.groups.pop(name)

    def drop(self, name: str) -> None:
        for number in range(len(self.groups.pop(name, ()))):
            del self._modules[f"{name}:{number}"]

    def named(self, kind: str) -> list[tuple[str, Slot]]:
        """The slots of one kind that run now, in the order of the active deltas, with the delta's name."""
        if self.plan.routes:
            if torch.compiler.is_compiling():
                raise MethodError("a route is open, and a graph that is captured now would hold for every thread.",
                                  "Compile or export the model before the route opens, or when it is closed.")
            if (own := self.plan.routes.get(thread())) is not None:
                return own.at(self, kind)
        groups = self.groups
        return [(name, slot) for name in self.plan.active if name in groups for slot in groups[name]
                if slot.kind == kind]

    def live(self, kind: str) -> list[Slot]:
        """The slots of one kind that run now."""
        return [slot for _, slot in self.named(kind)]

    def fed(self, slot: Slot, x: Tensor) -> Tensor:
        """What a slot reads: the input of its source, where that is not its host."""
        return x if slot.site.source is None else self.stash.get((thread(), slot.site.source), x)

    def clear(self) -> None:
        for key in [k for k in self.stash if k[0] == thread()]:
            del self.stash[key]


class Root(Insert):
    """The child of the model itself: the plan, the deltas, and what each shares between its sites.

    It keeps what is read of the backbone once: its anatomy, size and fingerprint.
    """

    def __init__(self) -> None:
        super().__init__(Plan())
        self.deltas: dict[str, Any] = {}
        self.required: dict[str, bool] = {}
        self.anatomy: Anatomy | None = None
        self.backbone: int | None = None
        self.places: list[tuple[str, nn.Module, str]] | None = None
        self.digests: tuple[Any, dict[str, str]] | None = None
        self.shared = nn.Module()
        self.leaving: list[Any] = []


def thread() -> int:
    """This thread's number; one for all while a graph is captured, which has no threads."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def insert_at(host: nn.Module, plan: Plan) -> Insert:
    """The host's insert, made and registered if it has none."""
    if CHILD not in host._modules:
        host.add_module(CHILD, Insert(plan))
    return host._modules[CHILD]  # type: ignore[return-value]


def hook_output(host: nn.Module) -> None:
    hook_with(host, _output)


def hook_input(host: nn.Module) -> None:
    if _input not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_input)


def hook_with(host: nn.Module, function: Any, pre: bool = False) -> None:
    """Register a primitive's own hook on a host, once; it is called with the keyword arguments as well.

    That it takes them is written down first: register_forward_hook does it last, and a call of another thread that
    comes between fails.
    """
    hooks, marks = ((host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs) if pre else
                    (host._forward_hooks, host._forward_hooks_with_kwargs))
    if function not in hooks.values():
        key = RemovableHandle(hooks).id
        marks[key] = True
        hooks[key] = function


def hook_source(source: nn.Module, path: str, target: nn.Module, plan: Plan) -> None:
    """Let the input of `source`, at `path`, reach the slots of `target`, within one forward of their block."""
    insert, sink = insert_at(source, plan), insert_at(target, plan)
    if all(fed is not sink for fed, _ in insert.feeds):
        insert.feeds = (*insert.feeds, (sink, path))
    hook_with(source, _feed, pre=True)


def unhook(host: nn.Module, functions: tuple[Any, ...]) -> None:
    """Remove our hooks from a host; a copy of the model has its own dictionaries, so by identity."""
    for hooks, marks in ((host._forward_hooks, ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
                         (host._forward_pre_hooks, ("_forward_pre_hooks_with_kwargs",))):
        for key in [k for k, f in hooks.items() if f in functions]:
            del hooks[key]
            for mark in marks:
                getattr(host, mark).pop(key, None)


def prune(host: nn.Module, functions: tuple[Any, ...]) -> None:
    """Take our hooks and child off a host where no delta has a slot any more."""
    insert = host._modules[CHILD]
    assert isinstance(insert, Insert)
    insert.feeds = tuple(feed for feed in insert.feeds if feed[0].groups)
    if not insert.groups and not insert.feeds:
        unhook(host, functions)
        if not isinstance(insert, Root):
            del host._modules[CHILD]


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's main input, by position or by name."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _feed(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    insert: Insert = source._modules[CHILD]  # type: ignore[assignment]
    for sink, path in insert.feeds:
        if sink.live("output") or sink.live("input"):
            sink.stash[thread(), path] = first(args, kwargs)


def _output(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    insert: Insert = host._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("output")
    if not slots:
        return None
    y = _through(insert, slots, host, first(args, kwargs), out[0] if isinstance(out, tuple) else out)
    insert.clear()
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _input(host: nn.Module, args: tuple[Any, ...]) -> Any:
    insert: Insert = host._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("input")
    if not slots:
        return None
    y = _through(insert, slots, host, None, args[0])
    if not insert.live("output"):  # nobody else reads it
        insert.clear()
    return (y, *args[1:])


def _through(insert: Insert, slots: list[Slot], host: nn.Module, x: Tensor | None, y: Tensor) -> Tensor:
    """y behind all slots: one after the other, or the weighted sum of what each delta alone would change."""
    weights = insert.plan.weights
    if not weights or thread() in insert.plan.routes:
        return _stacked(insert, slots, host, x, y)
    total = y
    for name in insert.plan.active:
        own = [slot for slot in slots if slot in insert.groups.get(name, ())]
        if own:
            total = total + weights[name] * (_stacked(insert, own, host, x, y.clone()) - y)
    return total


def _stacked(insert: Insert, slots: list[Slot], host: nn.Module, x: Tensor | None, y: Tensor) -> Tensor:
    for slot in slots:
        y = slot.run(host, insert.fed(slot, y if x is None else x), y)
    return y


HOOKS = (_output, _input, _feed)
