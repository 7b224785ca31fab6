"""Routing: one batch in which each example has its own delta.

    y_i <- f(x_i, y_i; theta_{task(i)})

The parameters of the deltas that a batch names are stacked, and a row is taken for each example; then the method
runs once, with an example axis. Deltas of other methods share the batch where both add to outputs, or to keys and
values: each method runs once, on its examples. A tensor of the backbone or head that tasks own is one of each
example's own, by vmap. Tasks may have other numbers of labels (see labels.py).

A route belongs to its thread and holds what it was opened with, so a delta that is added, replaced or detached
meanwhile changes no answer of it.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.delta import Delta
from slimtune.core.disentangled import each_bias
from slimtune.core.eager import EAGER
from slimtune.core.examples import batch_size, forwards, with_tensors
from slimtune.core.insert import CHILD, LOCK, Insert, Root, Slot, hook_with, thread, unhook
from slimtune.core.labels import losses, masked, stacked
from slimtune.core.sites import join
from slimtune.core.switch import deltas
from slimtune.core.unfreeze import base_modules
from slimtune.errors import DeltaError, MethodError, listing, suggest

ADDS = ("output", "input", "checkpoint")
"""Kinds of slots that may stand in a batch beside other methods, or beside the plain backbone; so may keys and values
that are made of their own parameters alone."""


class Route:
    """What one `with route(...)` runs: slots with a value for each example, by the insert where they stand."""

    def __init__(self, model: nn.Module, tasks: Sequence[str | None]) -> None:
        found = deltas(model)
        for name in tasks:
            if name is not None and name not in found:
                raise DeltaError(f"no delta named '{name}' is attached.", f"There are: {listing(found) or 'none'}",
                                 suggest(name, found))
        for delta in found.values():
            if delta.merged:
                raise DeltaError(f"delta '{delta.name}' is merged into the backbone.", "Call unmerge() on it first.")
        self.size = len(tasks)
        self.slots: dict[int, list[tuple[str, Slot]]] = {}
        self.owned: dict[tuple[int, str], Callable[..., Any]] = {}
        self.hosts: dict[tuple[int, str], nn.Module] = {}
        self.widths: list[int] = []
        chosen = [None if name is None else found[name] for name in tasks]
        groups: dict[str, list[int]] = {}
        for row, delta in enumerate(chosen):
            if delta is not None:
                groups.setdefault(delta.signature, []).append(row)
        for number, rows in enumerate(groups.values()):
            self._group(number, [chosen[r] for r in rows], rows, groups)  # type: ignore[misc]
        self._own(model, chosen)
        for module, name, function in each_bias(base_modules(model)) if self.slots else ():
            self.owned[id(module), name], self.hosts[id(module), name] = function, module

    def _group(self, number: int, own: list[Delta], rows: list[int], groups: dict[str, list[int]]) -> None:
        """Slots of one method for its examples."""
        lead = own[0]
        index = None if len(rows) == self.size else torch.tensor(rows)
        distinct = list({id(d): d for d in own}.values())
        take = [distinct.index(d) for d in own]
        shared = {key: _stacked([d.shared[key] for d in distinct], take) for key in lead.shared}
        for position, (_, slot) in enumerate(lead.slots):
            if index is not None and slot.kind not in ADDS and (slot.kind != "kv" or slot.relative):
                raise MethodError(f"{type(slot.method).__name__} does not add to a module's output, so it cannot share "
                                  f"a batch with other methods or the plain backbone ({len(groups)} methods, "
                                  f"{self.size} examples).", "Call the model once for each method's examples.")
            made = Slot(slot.method, slot.site, slot.kind, slot.label, shared.get(slot.label.rpartition(".")[2]))
            values = _stacked([d.slots[position][1] for d in distinct], take)
            made.__dict__.update(causal=slot.causal, relative=slot.relative, training=slot.training, rows=len(rows),
                                 all=self.size, index=index, _parameters=values._parameters, each=values.each)
            self.slots.setdefault(id(slot.home), []).append((f"route{number}", made))

    def _own(self, model: nn.Module, chosen: Sequence[Delta | None]) -> None:
        """Forwards of the modules whose tensors a task of this batch owns, or a delta that is active elsewhere."""
        values = {id(d): {own.path: own.value for own in d.owned} for d in chosen if d is not None}
        apart: dict[int, dict[str, Tensor]] = {}
        alike: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
        widths: dict[int, list[int]] = {}
        for key, (module, names) in _places(model).items():
            rows = {n: [base if d is None else values[id(d)].get(path, base) for d in chosen]
                    for n, (path, base) in names.items()}
            if any(v.shape != names[n][1].shape for n, row in rows.items() for v in row):  # other labels
                widths[key] = [v.shape[0] for v in next(iter(rows.values()))]
            if all(v is row[0] for row in rows.values() for v in row):
                alike[key] = module, {n: row[0] for n, row in rows.items()}
            else:
                apart[key] = {n: stacked(row) for n, row in rows.items()}
        inside: set[int] = set()
        for module, name, function in forwards(model, apart, self.size):
            if id(module) in widths:
                self.widths = widths.pop(id(module))
                function = masked(function, self.widths)
            self.owned[id(module), name], self.hosts[id(module), name] = function, module
            inside |= {id(m) for m in module.modules()}
        for key, (module, tensors) in alike.items():
            if key not in inside:
                self.widths = widths.pop(key, self.widths)
                self._keep(module, tensors)
        if widths:
            raise MethodError("tasks of this route have other numbers of labels, and train what is around the head.",
                              "Call the model once for each number of labels.")

    def _keep(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.owned[id(module), "forward"], self.hosts[id(module), "forward"] = with_tensors(module, tensors), module

    def pin(self, root: Root, module: nn.Module, names: dict[str, Tensor]) -> None:
        """Keep these tensors of a module that a delta is about to swap."""
        if (id(module), "forward") not in self.owned:
            self._keep(module, names)
            _dispatch(root, module, "forward")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, by its own task's labels, (B).

            L_i = mean over scored tokens t of -log softmax(z_it)[y_it];    of a task with one label, (z_it - y_it)^2

        A model counts its own labels, so where tasks have others it is called without, and this is the loss.
        Shapes: logits (B, K) and labels (B), or logits (B, T, K) and labels (B, T), of which -100 is not scored.
        Errors: DeltaError for other shapes, or a label that the example's task does not have.
        """
        return losses(logits, labels, self.widths or [logits.shape[-1]] * self.size)

    def at(self, insert: Insert, kind: str) -> list[tuple[str, Slot]]:
        return [(name, slot) for name, slot in self.slots.get(id(insert), ()) if slot.kind == kind]


def _places(model: nn.Module) -> dict[int, tuple[nn.Module, dict[str, tuple[str, Tensor]]]]:
    """Every module with a tensor that some delta owns, or of a head: by id, with the base's tensors and their paths."""
    root: Root = model._modules[CHILD]  # type: ignore[assignment]
    found: dict[int, tuple[nn.Module, dict[str, tuple[str, Tensor]]]] = {}
    seen: set[str] = set()
    for delta in list(root.deltas.values()):
        for own in delta.owned:
            if own.path not in seen:  # most deltas own the same ones
                seen.add(own.path)
                for module, name in own.places:
                    found.setdefault(id(module), (module, {}))[1][name] = (own.path, own.base)
    for head in root.anatomy.heads if root.anatomy is not None else ():
        for path, module in base_modules(model.get_submodule(head)):
            for name, p in module._parameters.items():
                if p is not None:
                    found.setdefault(id(module), (module, {}))[1].setdefault(name, (join(head, path, name), p))
    return found


def _stacked(modules: Sequence[nn.Module], take: Sequence[int]) -> nn.Module:
    """A module whose trained tensors are those of the modules, a row for each example.

    Constants are the first one's where all have the same; otherwise a row for each example too, named in `each`.
    """
    made = nn.Module()
    made.__dict__["each"] = each = []
    for name, p in modules[0]._parameters.items():
        if p is None:
            continue
        values: list[Tensor] = [m._parameters[name] for m in modules]  # type: ignore[misc]
        alike = not p.is_floating_point() and all(torch.equal(p, v) for v in values[1:])
        if not alike and not p.is_floating_point():
            each.append(name)
        made.__dict__["_parameters"][name] = p if alike else torch.stack([values[i] for i in take])
    return made


@contextmanager
def route(model: nn.Module, tasks: Sequence[str | None]) -> Iterator[Route]:
    """Let each example of the batch run with its own delta, and its own head; None is the plain backbone.

    For inference, training and `generate`, where beams repeat their example. Gradients reach each delta's own
    parameters. Only this thread is routed. In training, open a new route for each step: it reads the values once.
    Where tasks have other numbers of labels (`load(..., labels="own")`), logits are as wide as the most, and a label
    that a task does not have is the dtype's least number; the loss is then `run.losses(logits, labels)`, of
    `with route(...) as run`. While a route is open, compiled models run uncompiled.

    Errors: DeltaError for an unknown task, or another number of tasks than examples; MethodError where methods
    cannot share a batch: it says which.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.testing import batch, tiny
        >>> model = tiny("bert")
        >>> for seed, name in enumerate(("sst2", "cola")):
        ...     _ = attach(model, LoRA(rank=2), name=name, seed=seed)
        >>> with route(model, ["sst2", "cola", None]):
        ...     logits = model(**batch("bert")).logits
    """
    root = model._modules.get(CHILD)
    if not isinstance(root, Root):
        raise DeltaError("no delta is attached to this model.", "Attach or load the tasks' deltas first.")
    if thread() in root.plan.routes:
        raise DeltaError("this thread has a route open on this model already.", "Close it first.")
    with LOCK:
        found = Route(model, tasks)
        EAGER.begin()
        hook_with(model, _check, pre=True)
        root.plan.routes[thread()] = found
        for (_, name), module in found.hosts.items():
            _dispatch(root, module, name)
    try:
        yield found
    finally:
        with LOCK:
            EAGER.end()
            del root.plan.routes[thread()]
            if not root.plan.routes:
                unhook(model, (_check,))
            for (_, name), module in found.hosts.items():
                _undispatch(module, name)
            waiting, root.leaving = (root.leaving, []) if not root.plan.routes else ([], root.leaving)
            for leave in waiting:
                leave()


def _check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Before the model's forward: as many examples as tasks. Without kwargs it is called while it comes off."""
    root = model._modules.get(CHILD)
    own: Route | None = root.plan.routes.get(thread()) if isinstance(root, Root) else None
    if own is None or kwargs is None:
        return
    rows = batch_size(args, kwargs)
    if rows % own.size:
        raise DeltaError(f"the route has {own.size} tasks, and the batch {rows} examples.",
                         "Name one task for each example.")


def _dispatch(root: Root, module: nn.Module, name: str) -> None:
    """Let a module's function ask for the thread's route; users are counted, for threads share it."""
    current = module.__dict__.get(name)
    if isinstance(current, _Routed):
        current.users += 1
    else:
        own = {name: current} if current is not None else {}  # such as accelerate's
        module.__dict__[name] = _Routed(root, (id(module), name), getattr(module, name), own)


def _undispatch(module: nn.Module, name: str) -> None:
    current: _Routed = module.__dict__[name]
    current.users -= 1
    if not current.users:
        del module.__dict__[name]
        module.__dict__.update(current.own)


class _Routed:
    """A module's function while some thread has a route."""

    def __init__(self, root: Root, key: tuple[int, str], original: Callable[..., Any],
                 own: dict[str, Callable[..., Any]]) -> None:
        self.root, self.key, self.original, self.own, self.users = root, key, original, own, 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.root.plan.routes.get(thread())
        run = own.owned.get(self.key) if own is not None else None
        return (self.original if run is None else run)(*args, **kwargs)
