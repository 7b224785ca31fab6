"""Method: a frozen, validated configuration, and one rule of how it goes on a backbone.

The four primitives (`Add`, `KeysValues`/`Prompt`, `Side`, `Unfreeze`) are Methods; a published method
subclasses one of them and states where it goes, what it trains and its equation. The registry scans
`slimtune.methods`; `register` adds one from anywhere else.
"""
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.init import Params
from slimtune.core.insert import Plan, Slot
from slimtune.core.sites import Site
from slimtune.errors import MethodError, listing, suggest

NORMS = {"none": (), "all": ("norm.*",), "mlp": ("norm.mlp",), "attn": ("norm.attn",),
         "mlp+embed": ("norm.mlp", "norm.embed")}
Norms: TypeAlias = Literal["none", "all", "mlp", "attn", "mlp+embed"]


class Builder(Protocol):
    """What a method sees of the delta that is being made (see delta.py)."""

    model: nn.Module
    anatomy: Anatomy
    plan: Plan

    def module(self, path: str) -> nn.Module: ...
    def slot(self, method: "Method", site: Site, kind: str, params: Params) -> Slot: ...
    def feed(self, site: Site) -> None: ...
    def own(self, tensors: Sequence[str], group: Literal["adapter", "norms", "head"]) -> None: ...


class Method(BaseModel):
    """What every method can be told, whatever it trains.

    head: train the task head, keep it at its (saved) start, or leave it out of the delta.
    norms: which of the backbone's norms are trained beside the method, as its paper does by default.
    pooler: train the backbone's pooler with the head: of use where it is not pretrained.
    blocks: the blocks it goes on, counted within each tower, negative from the end; all by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    head: Literal["train", "freeze", "none"] = Field("train", description="train, freeze or leave out the task head")
    norms: Norms = Field("none", description="backbone norms trained beside it")
    pooler: bool = Field(False, description="train the pooler with the head")
    blocks: tuple[int, ...] | None = Field(None, description="blocks it goes on, per tower; all by default")

    primitive: ClassVar[str] = ""
    identity: ClassVar[bool] = True
    """The backbone's output is unchanged, bitwise, right after attaching."""
    silent: ClassVar[dict[str, str]] = {}
    """Tensors that get no gradient at the first step, by regular expression, with the reason."""

    def install(self, build: Builder) -> None:
        """Put the method on the backbone."""
        raise NotImplementedError

    def parts(self) -> list["Method"]:
        """The methods that it is a union of; itself alone by default."""
        return [self]

    @property
    def needs_data(self) -> bool:
        """Whether `calibrate` is to be called before training."""
        return False

    def calibrate(self, delta: Any, batches: Iterable[dict[str, Any]]) -> None:
        """Set a start that needs data. batches: the model's inputs, labels included."""

    def penalty(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        """What it adds to the loss, a scalar; None for nothing."""
        return None

    def starts_as_identity(self) -> bool:
        """`identity`, for a method in which it depends on the settings."""
        return self.identity

    def resting(self) -> dict[str, str]:
        """`silent`, for a method in which it depends on the settings."""
        return self.silent

    def final(self, slots: list[Slot]) -> tuple["Method", dict[str, torch.Tensor]] | None:
        """What is saved in its stead when training is over: (method, state); None for itself."""
        return None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error) from None


def explain(cls: type[BaseModel], error: ValidationError) -> MethodError:
    """pydantic's complaint as one of ours: the key, what is wrong, what the method takes."""
    keys = list(cls.model_fields)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return MethodError(f"{cls.__name__}.{where}: no such argument.", f"It takes: {listing(keys)}",
                           suggest(where, keys))
    return MethodError(f"{cls.__name__}.{where}: {first['msg']} (got {first.get('input')!r}).",
                       f"It takes: {listing(keys)}")


_REGISTRY: dict[str, type[Method]] = {}


def key_of(cls: type) -> str:
    """A class name as the registry's and recipes' name.

    Example:
        >>> [key_of(type(n, (), {})) for n in ("LoRA", "BitFit", "PrefixTuning", "IA3", "MAM")]
        ['lora', 'bitfit', 'prefix_tuning', 'ia3', 'mam']
    """
    name = cls.__name__
    if name in _JOINED or name.isupper():
        return name.lower()
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_JOINED = {"BitFit", "LoRA", "DoRA", "LoHa", "LoKr", "FacT", "AdaptFormer", "RepAdapter", "KAdaptation", "GraSP",
           "AdapterBias", "SynFlow", "SparseGPT"}


def register(cls: type[Method]) -> type[Method]:
    """Make a method known by name: in recipes, on the command line, in files. Usable as a decorator.

    Errors: MethodError when another class has that name.
    """
    name = key_of(cls)
    other = _REGISTRY.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise MethodError(f"a method named '{name}' is registered already, by {other.__module__}.",
                          "Give your class another name.")
    _REGISTRY[name] = cls
    return cls


def registered() -> dict[str, type[Method]]:
    """Every known method by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def find(name: str) -> type[Method]:
    """The class of a method's name.

    Errors: MethodError for an unknown name; it lists those that exist.
    """
    if name not in _REGISTRY:
        raise MethodError(f"no method is named '{name}'.", f"There are: {listing(registered())}",
                          suggest(name, registered()))
    return _REGISTRY[name]


def to_config(method: Method) -> dict[str, Any]:
    """A method as plain data: its name and every value, as files and recipes hold it."""
    return {"name": key_of(type(method)), **method.model_dump(mode="json")}


def from_config(config: dict[str, Any]) -> Method:
    """The method that `to_config` wrote, or a recipe states.

    Errors: MethodError for a missing or unknown name, an unknown argument or a bad value.
    """
    values = dict(config)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise MethodError("a method needs a name.", f"There are: {listing(registered())}")
    return find(name)(**values)


def base_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of new parameters: float32 master weights beside a half-precision backbone."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
