"""The example axis in training: every trained number expanded to the batch, so its gradient is each example's.

    theta -> [theta, ..., theta], (B, *shape);    the gradient of the expanded tensor is the per-example gradient

What a delta adds runs on expanded parameters as it is, for its functions allow a leading example axis. A tensor of
the backbone stands in a module that allows none. Of linear maps, embeddings and layer norms it is kept what the
gradients are made of (see bookkeeping.py); another module's forward runs once for each example's copy, by vmap.
A tensor used in several places has one gradient an example, their sum, before anybody takes a norm.
"""
import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from slimtune.core.bookkeeping import Outer, Rows, Whole, keeping, keeps, shared
from slimtune.core.disentangled import each_bias
from slimtune.core.insert import CHILD, Root
from slimtune.core.switch import deltas
from slimtune.core.unfreeze import base_modules
from slimtune.errors import DeltaError, listing

BIAS, MAKER = "relative_attention_bias", "compute_bias"
"""A table of positions, which all examples share, and the method of the module above it that reads it (T5)."""


class ExampleGradients:
    """What `per_example` yields: the expanded tensors of one forward, and after backward their gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active = [d for d in deltas(model).values() if d.active]
        self.leaves: dict[int, Tensor] = {}
        self.kept: dict[int, list[Whole | Outer]] = {}
        self.size: int | None = None
        self.undo: list[Callable[[], object]] = []
        standing = {id(p) for p in model.parameters()}  # of tensors that two deltas own, the last one's stands
        self.names = [(d, n, p) for d in self.active for n, p in d.named_parameters() if id(p) in standing]

    def rows(self) -> dict[str, Rows]:
        """Per-example gradients by name of state, as norms and weighted sums take them; each call gives new ones.

        With several deltas a name stands behind the delta's.
        Errors: DeltaError before a backward pass, or for a trained tensor that the loss does not depend on.
        """
        found: dict[str, Rows] = {}
        resting = {d.name: d.resting() for d in self.active}
        for delta, name, p in self.names:
            uses, leaf = list(self.kept.get(id(p), ())), self.leaves.get(id(p))
            if leaf is not None and leaf.grad is not None:
                uses.append(Whole(leaf.grad))
            if not uses and (self.size is None or name not in resting[delta.name]):
                raise DeltaError(f"no gradient of an example reaches {name}.",
                                 "Run model(...) and backward inside `with per_example(model)`, with this delta "
                                 "active, on a loss that depends on it.")
            front = f"{delta.name}/" if len(self.active) > 1 else ""
            found[front + name] = Rows(p.shape, uses or [Whole(p.new_zeros(self.size or 0, *p.shape))])
        return found

    def collect(self) -> dict[str, Tensor]:
        """Per-example gradients by name of state, (B, *shape): B times what is trained. Errors: as `rows`."""
        return {name: rows.each() for name, rows in self.rows().items()}

    def take(self) -> dict[str, Rows]:
        """The rows, which then are the caller's alone: what he drops is freed."""
        found = self.rows()
        self.kept.clear()
        self.leaves.clear()
        return found

    # expanding

    def begin(self, size: int) -> None:
        if self.size == size:
            return
        if self.size is not None:
            raise DeltaError(f"per_example began with {self.size} examples, and is now called with {size}.",
                             "Open a new `with per_example(model)` for each batch.")
        self.size = self.active[0].root.plan.examples = size
        for delta in self.active:
            for module in (*delta.shared.values(), *(slot for _, slot in delta.slots)):
                for name, p in module._parameters.items():
                    if p is not None and p.is_floating_point():
                        self._swap(module, name, p)
            for _, slot in delta.slots:
                slot.__dict__["rows"] = size
                self.undo.append(lambda slot=slot: slot.__dict__.update(rows=None))
        self._owned()

    def _leaf(self, p: Tensor) -> Tensor:
        assert self.size is not None
        if id(p) not in self.leaves:
            self.leaves[id(p)] = nn.Parameter(p.detach().expand(self.size, *p.shape))
        return self.leaves[id(p)]

    def _swap(self, module: nn.Module, name: str, p: nn.Parameter) -> None:
        expanded = self._leaf(p) if p.requires_grad else p.detach().expand(self.size or 1, *p.shape)
        module._parameters[name] = expanded  # type: ignore[assignment]
        self.undo.append(lambda: module._parameters.__setitem__(name, p))

    def _owned(self) -> None:
        """Give each module with trained tensors of the backbone a forward that has gradients of each example."""
        assert self.size is not None
        trained: dict[int, dict[str, nn.Parameter]] = {}
        for own in (own for delta in self.active for own in delta.owned if own.value.requires_grad):
            for module, name in own.places:
                if module._parameters[name] is own.value:
                    trained.setdefault(id(module), {})[name] = own.value
        kept = [module for path, module in outermost(self.model, trained) if keeps(module) and not path.endswith(BIAS)]
        for module in kept:
            own = trained.pop(id(module))
            self._replace(module, "forward", keeping(module, own, self.size, lambda name, use, own=own:
                                                     self.kept.setdefault(id(own[name]), []).append(use)))
        leaves = {key: {name: self._leaf(p) for name, p in own.items()} for key, own in trained.items()}
        for module, name, function in (*forwards(self.model, leaves, self.size), *each_bias(base_modules(self.model))):
            self._replace(module, name, function)

    def _replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        own = {name: module.__dict__[name]} if name in module.__dict__ else {}  # such as accelerate's
        module.__dict__[name] = function
        self.undo.append(lambda: (module.__dict__.pop(name), module.__dict__.update(own)))


@contextmanager
def per_example(model: nn.Module) -> Iterator[ExampleGradients]:
    """Per-example gradients of all that the active deltas train, from one backward pass.

    Call the model, and backward on the sum of a loss vector, inside the `with`; then `collect()`. The number of
    examples is the first axis of the first input. Nothing is left behind, also after an error.

    Errors: DeltaError without an active delta; MethodError where a site works on rows that are no examples.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import LoRA
        >>> from slimtune.testing import batch, tiny
        >>> model, inputs = tiny("bert"), batch("bert")
        >>> delta = attach(model, LoRA(rank=2))
        >>> with per_example(model) as grads:
        ...     logits = model(**inputs).logits
        ...     torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="sum").backward()
        >>> grads.collect()["encoder.0.attn.q.lora.B"].shape[0] == len(logits)
        True
    """
    found = ExampleGradients(model)
    if not found.active:
        raise DeltaError("per_example needs an active delta.", f"There are: {listing(deltas(model)) or 'none'}")
    root = model._modules[CHILD]
    assert isinstance(root, Root)
    if root.plan.examples is not None:
        raise DeltaError("per_example is open on this model already.", "Close it before the next batch.")
    handle = model.register_forward_pre_hook(lambda m, a, k: found.begin(batch_size(a, k)), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
        for step in reversed(found.undo):
            step()
        root.plan.examples = None


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The first axis of a call's first tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise DeltaError("the model was called without a tensor, so its examples cannot be counted.",
                     "Call it with input_ids=..., inputs_embeds=... or pixel_values=...")


def forwards(model: nn.Module, leaves: Mapping[int, Mapping[str, Tensor]],
             size: int) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """(module, name, function): what stands in for functions of these modules, given by id with expanded tensors.

    A module inside another of them is run by that one.
    """
    for path, module in outermost(model, leaves):
        above = model.get_submodule(path.rpartition(".")[0])
        if path.endswith(BIAS) and hasattr(above, MAKER):
            yield above, MAKER, _each_table(above, module, leaves[id(module)]["weight"])
        else:
            own = {f"{inner}.{name}".removeprefix("."): t for inner, m in module.named_modules() if id(m) in leaves
                   for name, t in leaves[id(m)].items()}
            yield module, "forward", each_example(module, own, size)


def outermost(model: nn.Module, chosen: Container[int]) -> list[tuple[str, nn.Module]]:
    """(path, module) of the modules chosen by id that stand in no other of them."""
    paths = {path: m for path, m in base_modules(model) if id(m) in chosen} if chosen else {}
    return [(path, m) for path, m in paths.items() if not any(path.startswith(f"{other}.") for other in paths)]


def _bare(module: nn.Module) -> nn.Module:
    """A copy without hooks and without a forward of its own, which shares all tensors."""
    made = copy.copy(module)
    made.__dict__ = {**module.__dict__, "_forward_hooks": {}, "_forward_pre_hooks": {},
                     "_parameters": dict(module._parameters),
                     "_modules": {n: m for n, m in module._modules.items() if n != CHILD}}
    made.__dict__.pop("forward", None)
    return made


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The module's forward with these tensors in the place of its own, for all examples."""
    bare = _bare(module)
    return lambda *args, **kwargs: functional_call(bare, dict(tensors), args, kwargs)


def each_example(module: nn.Module, leaves: Mapping[str, Tensor], size: int) -> Callable[..., Any]:
    """The module's forward with a copy of these tensors for each example.

    An input whose first axis is a multiple of the examples is cut along it; others are shared. Positions that
    stand for all examples, (1, T), are repeated if there is nothing else.
    """
    bare = _bare(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        values, spec = tree_flatten((args, kwargs))
        rows_of = {i: v.shape[0] for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim() > 0}
        cut = [i for i, n in rows_of.items() if n >= size and n % size == 0]
        if not cut:
            cut = [i for i, n in rows_of.items() if n == 1 and not values[i].is_floating_point()]
            values = [v.expand(size, *v.shape[1:]) if i in cut else v for i, v in enumerate(values)]
        if not cut:
            raise shared(module, size)

        def one(own: dict[str, Tensor], *rows: Tensor) -> Any:
            mine = list(values)
            for i, row in zip(cut, rows, strict=True):
                mine[i] = row
            a, k = tree_unflatten(mine, spec)
            return functional_call(bare, own, a, k)

        pieces = [values[i].unflatten(0, (size, -1)) for i in cut]
        out = vmap(one, randomness="different")(dict(leaves), *pieces)
        return tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, out)

    return forward


def _each_table(above: nn.Module, table: nn.Module, leaf: Tensor) -> Callable[..., Any]:
    """The bias of each example, (B, heads, queries, keys), from its own copy of the table."""
    make = getattr(above, MAKER)

    def bias(*args: Any, **kwargs: Any) -> Tensor:
        def one(weight: Tensor) -> Tensor:
            table.__dict__["forward"] = lambda positions: torch.nn.functional.embedding(positions, weight)
            try:
                return make(*args, **kwargs)
            finally:
                table.__dict__.pop("forward")
        return vmap(one)(leaf).flatten(0, 1)

    return bias
