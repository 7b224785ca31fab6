"""Delta: all that one task trains and saves, and how to switch it, merge it and take it off."""
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.count import Count
from slimtune.core.fingerprint import content, fingerprint
from slimtune.core.insert import CHILD, LOCK, Root, Slot
from slimtune.core.mask import apply_masks, kept, set_masks
from slimtune.core.merge import merged
from slimtune.core.method import Method, to_config
from slimtune.core.store import save
from slimtune.core.switch import leave, set_active
from slimtune.core.unfreeze import Owned, base_parameters
from slimtune.errors import DeltaError, listing


class Delta:
    """What `attach` returns. Its parameters are the only ones an optimizer needs.

    Names of state: `<tower>.<block>.<role>.<method>.<parameter>` for what is added, `own.<path>` for
    tensors of the backbone, `head.<path>` for the head. They speak of roles, not of module paths, so
    a file survives a renaming of modules in transformers.
    """

    def __init__(self, model: nn.Module, name: str, methods: Sequence[Method], anatomy: Anatomy, seed: int) -> None:
        self.model, self.name, self.methods, self.anatomy, self.seed = model, name, tuple(methods), anatomy, seed
        self.slots: list[tuple[str, Slot]] = []  # (path of the host, slot)
        self.shared: dict[str, nn.Module] = {}
        self.owned: list[Owned] = []
        self.hosts: list[nn.Module] = []  # every module that has a slot or a hook of this delta
        self.masks: dict[str, Tensor] = {}
        self.info: dict[str, Any] = {}
        self._gone = False
        self.merged = False
        self._unmerge: list[tuple[nn.Module, str, nn.Parameter]] = []

    # what it holds

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every tensor of the delta by its name of state, trained or kept."""
        found: dict[str, nn.Parameter] = {}
        for key, module in self.shared.items():
            found |= {f"shared.{key}.{n}": p for n, p in module._parameters.items() if p is not None}
        for _, slot in self.slots:
            found |= {f"{slot.label}.{n}": p for n, p in slot._parameters.items() if p is not None}
        return found | {own.key: own.value for own in self.owned if own.group != "pruned"}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors, by name of state."""
        self._alive()
        return ((n, p) for n, p in self.tensors().items() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors: `torch.optim.AdamW(delta.parameters())`."""
        return (p for _, p in self.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """All values by name, detached, not copied."""
        self._alive()
        return {n: p.detach() for n, p in self.tensors().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Set all values. Errors: DeltaError for missing or extra names and other shapes; nothing is set then."""
        tensors = self.tensors()
        check_names(tensors, state, f"delta '{self.name}'")
        for name, value in state.items():
            check_tensor(f"delta '{self.name}': {name}", value, tuple(tensors[name].shape), dtype=tensors[name].dtype)
        for name, value in state.items():
            tensors[name].copy_(value)
        apply_masks(self)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Let these masks hold, by name of state, in place of those before; {} gives the backbone's weights back.

        A mask is True where a weight lives, and of the tensor's shape. A name `own.<path>` of the backbone that the
        delta does not train masks the backbone while the delta is active. Values of the delta that do not live are
        set to 0, and cannot come back. Errors: DeltaError for an unknown name, or another shape, for a merged delta,
        and while a route is open; nothing is set then.
        Example:
            >>> from slimtune.core.attach import attach
            >>> from slimtune.testing import tiny
            >>> from slimtune.methods import LoRA
            >>> delta = attach(tiny("bert"), LoRA(rank=2, sites=("attn.q",)))
            >>> delta.set_masks({"encoder.0.attn.q.lora.A": torch.arange(64).reshape(2, 32) % 2 == 0})
            >>> delta.count().adapter
            224
        """
        self._alive()
        with LOCK:
            if self.root.plan.routes:
                raise DeltaError("a route is open on this model, and its answers need the weights as they are.",
                                 "Set masks when it is closed.")
            set_masks(self, masks)

    def count(self) -> Count:
        """What is trained and stored; see Count."""
        self._alive()
        sizes = {"adapter": 0, "norms": 0, "head": 0}
        stored = 0
        groups = {own.key: own.group for own in self.owned}
        for name, p in self.tensors().items():
            size = kept(self, name, p.numel())
            stored += size
            if p.requires_grad:
                sizes[groups.get(name, "adapter")] += size
        for method, slots in self.by_method():
            final = method.final(slots)
            if final is not None:  # a reparametrisation is dropped when the delta is saved
                names = [n for n in self.tensors() if self.is_of(n, slots)]
                stored += sum(t.numel() for t in final[1].values()) - sum(self.tensors()[n].numel() for n in names)
        if self.root.backbone is None:
            heads = tuple(h + "." for h in self.anatomy.heads)
            body = (p.numel() for path, p in base_parameters(self.model).items()
                    if not (heads and path.startswith(heads)))
            self.root.backbone = sum(body)
        return Count(**sizes, stored=stored, backbone=self.root.backbone)

    def by_method(self) -> list[tuple[Method, list[Slot]]]:
        """Each method of the union with its slots."""
        return [(m, [s for _, s in self.slots if s.method is m]) for m in self.methods]

    def is_of(self, name: str, slots: Sequence[Slot]) -> bool:
        """Whether a name of state belongs to the method that has these slots."""
        labels = {slot.label for slot in slots}
        keys = {label.rpartition(".")[2] for label in labels}
        return name.rpartition(".")[0] in labels or any(name.startswith(f"shared.{key}.") for key in keys)

    @cached_property
    def signature(self) -> str:
        """Deltas of one signature have the same slots, with tensors of the same shapes."""
        return json.dumps([[to_config(m) for m in self.methods], [slot.label for _, slot in self.slots]])

    def digest(self) -> str:
        """What tells this delta from every other, whatever its name: the SHA-256 of its content, in hexadecimal.

        It is another as soon as a number or a mask changes, and the same after saving and loading, unless saving drops
        a reparametrisation.
        """
        self._alive()
        return content(self.signature, self.state(), {f"mask.{name}": mask for name, mask in self.masks.items()})

    def penalty(self) -> Tensor | None:
        """What its methods add to the loss (see Method.penalty), or None."""
        terms = [t for method, slots in self.by_method() if (t := method.penalty(slots)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def resting(self) -> dict[str, str]:
        """Names of state that get no gradient at the first step, with the method's reason."""
        found: dict[str, str] = {}
        for method, slots in self.by_method():
            names = [n for n, _ in self.named_parameters() if not slots or self.is_of(n, slots)]
            for pattern, why in method.resting().items():
                found |= {n: why for n in names if re.search(pattern, n)}
        return found

    def save(self, folder: Path | str, *, overwrite: bool = True) -> None:
        """Write `delta.safetensors` and `delta.json`, atomically; a reparametrisation is dropped.

        Errors: DeltaError when the folder holds something else, or a value is not finite.
        """
        self._alive()
        save(self, folder, overwrite=overwrite)

    # when it runs

    @property
    def root(self) -> Root:
        return self.model._modules[CHILD]  # type: ignore[return-value]

    @property
    def active(self) -> bool:
        return self.name in self.root.plan.active

    def activate(self) -> None:
        """Make this delta the one that runs; a pointer, whatever the size of the model."""
        self._alive()
        set_active(self.root, (self.name,))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain backbone for the length of a `with`."""
        self._alive()
        before, weights = self.root.plan.active, self.root.plan.weights
        set_active(self.root, tuple(n for n in before if n != self.name), weights)
        try:
            yield
        finally:
            set_active(self.root, before, weights)

    # how it ends

    def merge(self, *, zeros: Literal["keep", "fill"] | None = None) -> None:
        """Fold the delta into the backbone's weights, in float32; the hooks then do nothing.

        Until unmerge() no other delta can be attached or made active, and this one cannot be disabled.
        zeros: where the delta masks the backbone's weights, "fill" gives m * W + dW, which does what the delta does
        and is dense, and "keep" gives m * (W + dW).
        Errors: MethodError when a method is not linear; DeltaError when it is merged already, not the one that runs,
        or masks the backbone and `zeros` is not said, and while a route is open.
        """
        self._alive()
        with LOCK:
            self._merge(zeros)

    def _merge(self, zeros: Literal["keep", "fill"] | None) -> None:
        if self.root.plan.routes:
            raise DeltaError("a route is open on this model, and its answers need the backbone's own weights.",
                             "Merge when it is closed.")
        if self.merged:
            raise DeltaError(f"delta '{self.name}' is merged already.", "Call unmerge() first.")
        if self.root.plan.active != (self.name,) or self.root.plan.weights:
            raise DeltaError(f"delta '{self.name}' does not run alone: active are {listing(self.root.plan.active)}.",
                             "Call activate() on it, then merge it.")
        changes = merged(self, zeros)
        self.count()  # both are read once, before a merge adds biases
        fingerprint(self.model, self.anatomy)
        for module, name, value in changes:
            self._unmerge.append((module, name, module._parameters[name]))  # type: ignore[arg-type]
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for _, slot in self.slots:
            slot.kind = f"merged {slot.kind}"
        self.merged = True

    def unmerge(self) -> None:
        """Give the backbone its own tensors back, bitwise."""
        for module, name, parameter in reversed(self._unmerge):
            module._parameters[name] = parameter
        self._unmerge.clear()
        self.merged = False
        for _, slot in self.slots:
            slot.kind = slot.kind.removeprefix("merged ")

    def detach(self) -> None:
        """Take the delta off: no hook, module or attribute stays, and the base is bitwise as before."""
        self._alive()
        self.unmerge()
        with LOCK:
            root = self.root
            rest = tuple(n for n in root.plan.active if n != self.name)
            set_active(root, rest, {n: w for n, w in root.plan.weights.items() if n in rest})
            del root.deltas[self.name]
            leave(root, self.model, self.name, self.hosts, any(s.kind == "kv" for _, s in self.slots))
        self.slots, self.owned, self.hosts, self.shared = [], [], [], {}
        self._gone = True

    def _alive(self) -> None:
        if self._gone:
            raise DeltaError(f"delta '{self.name}' was detached.", "Attach it again, or load it from its folder.")

    def __repr__(self) -> str:
        kinds = " + ".join(type(m).__name__ for m in self.methods)
        return f"Delta('{self.name}': {kinds} on {self.anatomy.model_type}{', detached' if self._gone else ''})"


def check_names(have: Mapping[str, Any], given: Mapping[str, Any], who: str) -> None:
    """Errors: DeltaError when the names differ; it says which are missing and which are extra."""
    missing, extra = [n for n in have if n not in given], [n for n in given if n not in have]
    if missing or extra:
        raise DeltaError(f"{who}: the tensors' names do not fit.",
                         f"Missing: {listing(missing, 6)}" if missing else "",
                         f"Extra: {listing(extra, 6)}" if extra else "", "Nothing was loaded.")


def check_tensor(who: str, given: Tensor, shape: tuple[int, ...], advice: str = "",
                 dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor itself. Errors: DeltaError when it has another shape, or is no float where one should be."""
    if tuple(given.shape) != shape:
        raise DeltaError(f"{who} has shape {tuple(given.shape)}, and should have {shape}.", advice,
                         "Nothing was loaded.")
    if given.is_floating_point() != dtype.is_floating_point or not (dtype.is_floating_point or given.dtype == dtype):
        what = "floating-point numbers" if dtype.is_floating_point else dtype
        raise DeltaError(f"{who} holds {given.dtype}, and should hold {what}.", "Nothing was loaded.")
    return given
