"""attach: put a method, or a union of methods, on a model; nothing of the model changes if it fails."""
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy, dissect
from slimtune.core.bound import weight_at
from slimtune.core.delta import Delta, check_names, check_tensor
from slimtune.core.init import Init, Params
from slimtune.core.insert import CHILD, LOCK, Root, Slot, hook_source, hook_with, insert_at
from slimtune.core.labels import Labels, check_labels, expected, refuse_labels
from slimtune.core.method import NORMS, Method, base_dtype, key_of
from slimtune.core.reentrant import open_checkpoints
from slimtune.core.sites import Site, join, lookup
from slimtune.core.switch import release, set_active, strip, thaw
from slimtune.core.unfreeze import Owned, base_parameters, is_frozen_kind, places_of
from slimtune.errors import DeltaError, MethodError, listing


def attach(model: nn.Module, method: Method | Sequence[Method], name: str = "default", *, seed: int = 0,
           anatomy: Anatomy | None = None, state: Mapping[str, Tensor] | None = None,
           labels: Labels = "model") -> Delta:
    """Freeze the backbone, add what the method trains, and make it the delta that runs.

    A list of methods is their union. Parameters start from `seed`, whatever the global random state, or
    take the values of `state`. The first method of a union says how head and norms are treated.
    labels: "own" lets a head of `state` have another number of labels than the model, for routes (see route.py).

    Errors: MethodError for a method that cannot go on this backbone; SiteError for a site or block it does
    not have; DeltaError for a name in use, or a state that does not fit. The model is left as it was.
    Example:
        >>> from slimtune.testing import tiny
        >>> from slimtune.methods import LoRA
        >>> delta = attach(tiny("bert"), LoRA(rank=2, sites=("attn.q",)))
        >>> delta.count().adapter
        256
    """
    methods = _methods(method)
    with LOCK:
        return _attach(model, methods, name, seed, anatomy, state, labels)


def _attach(model: nn.Module, methods: tuple[Method, ...], name: str, seed: int, anatomy: Anatomy | None,
            state: Mapping[str, Tensor] | None, labels: Labels) -> Delta:
    root = _root(model, name)
    before = root.plan.active, root.plan.weights
    set_active(root, ())
    try:
        root.anatomy = anatomy or root.anatomy or dissect(model)
        build = _Build(model, name, methods, root.anatomy, root, seed, state, labels)
        delta = build.run()
    except BaseException:
        strip(root, name, list(model.modules()))
        release(root, model.modules())
        set_active(root, *before)
        if not root.deltas:
            thaw(model, root)
        raise
    root.deltas[name] = delta
    set_active(root, (name,))
    return delta


def _methods(method: Method | Sequence[Method]) -> tuple[Method, ...]:
    given = (method,) if isinstance(method, Method) else tuple(method)
    for m in given:
        if not isinstance(m, Method):
            raise MethodError(f"attach takes a method or a list of methods, and got {type(m).__name__}.",
                              "Pass for example slimtune.methods.LoRA(rank=8).")
    methods = [part for m in given for part in m.parts()]
    if not methods:
        raise MethodError("attach got an empty list of methods.", "Pass at least one.")
    sides = [type(m).__name__ for m in methods if m.primitive == "side"]
    if sides and len(sides) < len(methods):
        raise MethodError(f"{sides[0]} sends no gradient into the backbone, so what the union's other methods add to "
                          "it would never train.", "Attach them as deltas of their own.")
    # a union may hold equal configurations; each is its own object
    return tuple(m.model_copy() for m in methods)


def _root(model: nn.Module, name: str) -> Root:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise DeltaError(f"'{name}' is no name for a delta.", "Use letters, digits, '-' and '_', at most 100.")
    root = model._modules.get(CHILD)
    if root is None:
        root = Root()
        root.required = {path: p.requires_grad for path, p in base_parameters(model).items()}
        model.add_module(CHILD, root)
        root.train(model.training)
        for p in model.parameters():
            p.requires_grad_(False)
    assert isinstance(root, Root)
    if name in root.deltas:
        raise DeltaError(f"a delta named '{name}' is attached already.", f"There are: {listing(root.deltas)}",
                         "Choose another name, or detach that one first.")
    return root


class _Build:
    """The delta in the making: what methods see as `Builder`."""

    def __init__(self, model: nn.Module, name: str, methods: tuple[Method, ...], anatomy: Anatomy, root: Root,
                 seed: int, state: Mapping[str, Tensor] | None, labels: Labels) -> None:
        self.model, self.anatomy, self.root, self.plan = model, anatomy, root, root.plan
        self.name, self.seed, self.state, self.labels = name, seed, state, labels
        self.delta = Delta(model, name, methods, anatomy, seed)
        self.used: set[str] = set()
        self.modules: dict[str, nn.Module] = {}

    def run(self) -> Delta:
        keys: list[str] = []
        for method in self.delta.methods:
            key = key_of(type(method))
            self.key = key if key not in keys else f"{key}_{keys.count(key) + 1}"
            keys.append(key)
            self._share(method)
            method.install(self)
        leading = self.delta.methods[0]
        self._norms(leading)
        self._head(leading)
        if self.state is not None:
            check_names(self.delta.tensors(), self.state, f"delta '{self.name}'")
        if not any(p.requires_grad for p in self.delta.tensors().values()):
            why = f"head='{leading.head}'" if self.anatomy.heads else "it has no task head"
            raise MethodError(f"{type(leading).__name__} trains nothing on this {self.anatomy.model_type}: "
                              f"{why}.",
                              "Load the model with a task head, for example AutoModelForSequenceClassification.")
        if check_labels(self.delta.owned):
            hook_with(self.model, refuse_labels, pre=True)
        open_checkpoints(self.model, self.anatomy, self.plan, self.delta)
        return self.delta

    @cached_property
    def base(self) -> dict[str, nn.Parameter]:
        """The model's own parameters; no delta is active meanwhile."""
        return base_parameters(self.model)

    @cached_property
    def places(self) -> dict[int, list[tuple[nn.Module, str]]]:
        return places_of(self.model, {id(p) for p in self.base.values()})

    def module(self, path: str) -> nn.Module:
        if path not in self.modules:
            self.modules[path] = self.model.get_submodule(path)
        return self.modules[path]

    def _share(self, method: Method) -> None:
        where, shared = getattr(method, "where", None), getattr(method, "shared", None)
        params: Params = shared(where(self.anatomy)) if shared is not None and where is not None else {}
        if params:
            module = nn.Module()
            like = next(iter(self.base.values()))
            for name, init in params.items():
                module.register_parameter(name, self._parameter(f"shared.{self.key}.{name}", init, like))
            group = self.root.shared._modules.setdefault(self.name, nn.Module())
            group.add_module(self.key, module)  # type: ignore[union-attr]
            self.delta.shared[self.key] = module

    def slot(self, method: Method, site: Site, kind: str, params: Params) -> Slot:
        host = self.module(site.path)
        slot = Slot(method, site, kind, f"{site.name}.{self.key}", self.delta.shared.get(self.key))
        like = host._parameters.get("weight")
        if like is None or not like.is_floating_point():
            like = next((p for p in host.parameters() if p.is_floating_point()), None)
        if like is None:  # a dropout module has no tensors; its neighbours tell device and dtype
            like = next(self.module(site.source or site.path.rpartition(".")[0]).parameters())
        for name, init in params.items():
            weight = None if init.reads is None else self._weight(method, host, site)
            slot.register_parameter(name, self._parameter(f"{slot.label}.{name}", init, like, weight))
        slot.train(host.training)
        insert_at(host, self.plan).add(self.name, slot)
        self.delta.hosts.append(host)
        self.delta.slots.append((site.path, slot))
        return slot

    def _weight(self, method: Method, host: nn.Module, site: Site) -> Tensor:
        weight = host._parameters.get("weight")
        if weight is None or is_frozen_kind(weight):
            raise MethodError(f"{type(method).__name__} starts from the weight of {site.name}, which is "
                              f"{'not there' if weight is None else f'quantised ({weight.dtype})'}.",
                              "Use a method that does not read the weight, such as LoRA.")
        return weight_at(host, site)

    def feed(self, site: Site) -> None:
        """Let the input of the site's source reach its host."""
        source = self.module(str(site.source))
        hook_source(source, str(site.source), self.module(site.path), self.plan)
        self.delta.hosts.append(source)

    def _parameter(self, key: str, init: Init, like: Tensor, weight: Tensor | None = None) -> nn.Parameter:
        dtype = init.dtype or base_dtype(like)
        if self.state is not None and key in self.state:
            given = check_tensor(f"delta '{self.name}': {key}", self.state[key], init.shape, dtype=dtype)
            value = given.to(device=like.device, dtype=dtype, copy=True)
        else:
            value = init.make(self.seed, key, like.device, dtype, weight)
        return nn.Parameter(value, requires_grad=init.trainable)

    def own(self, tensors: Sequence[str], group: Literal["adapter", "norms", "head"], trained: bool = True) -> None:
        wanted = {path: self.base[path] for path in tensors if path not in self.used and path in self.base}
        for path, base in wanted.items():
            if is_frozen_kind(base):
                raise MethodError(f"{path} is quantised ({base.dtype}) and cannot be trained.",
                                  "Use a method that adds parameters, such as LoRA.")
            key = f"{'head' if group == 'head' else 'own'}.{path}"
            given = self.state.get(key) if self.state is not None else None
            if given is not None:
                free = group == "head" and self.labels == "own"
                shape = expected(self.model, self.places[id(base)], given, base) if free else base.shape
                check_tensor(f"delta '{self.name}': {key}", given, tuple(shape),
                             "Load the model with the delta's number of labels, or the delta with labels='own'."
                             if group == "head" else "")
            source = base.detach() if given is None else given.to(base.device, base.dtype)
            value = nn.Parameter(source.clone(), requires_grad=trained)
            self.delta.owned.append(Owned(path, group, base, value, self.places[id(base)]))
            self.used.add(path)

    def _norms(self, method: Method) -> None:
        for pattern in NORMS[method.norms]:
            if not any(s.role.startswith("norm.") for s in self.anatomy.sites):
                raise MethodError(f"norms='{method.norms}': no norms are known in {self.anatomy.model_type}.",
                                  "Set norms='none'.")
            paths = [s.path for s in self.anatomy.select((pattern,))]
            self.own([f"{path}.{n}" for path in paths for n, _ in self.module(path).named_parameters(recurse=False)],
                     "norms")

    def _pooler(self, method: Method) -> list[str]:
        if not method.pooler:
            return []
        path = join(self.anatomy.base, "pooler")
        if lookup(self.model, path) is None:
            raise MethodError(f"{type(method).__name__}.pooler: this {self.anatomy.model_type} has no pooler.",
                              "Leave pooler out.")
        return [path]

    def _head(self, method: Method) -> None:
        if method.head == "none":
            return
        heads = [*self._pooler(method), *self.anatomy.heads]
        paths = [f"{head}.{n}" for head in heads for n, _ in self.module(head).named_parameters()]
        self.own([p for p in paths if CHILD not in p.split(".")], "head", trained=method.head == "train")

