"""Criterion: which weights matter. A frozen configuration and one rule, `score`; larger is kept.

A file of this folder for each published criterion; `criteria()` scans it. What is pruned, how much of each tensor and
when are the business of target, allocation and schedule, so that any criterion goes with any of them.
"""
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from slimtune.core.method import explain, key_of
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.view import View


class Criterion(BaseModel):
    """What every criterion states.

    needs_data: it reads view.batches. observes: its scores are learned while the weights train (see observe.py).
    changes: it moves what lives to make up for what is pruned (`repair`), and so needs weights that the delta trains.
    signed: a score below 0 is worse than none, and not a matter of size. allocation: how its paper compares scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    needs_data: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    changes: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    allocation: ClassVar[str] = "global"

    def score(self, view: View) -> dict[str, Tensor]:
        """A score for each weight of each target, of its shape; the lowest are pruned."""
        raise NotImplementedError

    def repair(self, view: View, masks: dict[str, Tensor]) -> None:
        """Move what lives, for a criterion that `changes`; called before the masks are set."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error) from None  # type: ignore[arg-type]


_REGISTRY: dict[str, type[Criterion]] = {}
C = TypeVar("C", bound=Criterion)


def criterion(cls: type[C]) -> type[C]:
    """Make a criterion known by name. Usable as a decorator. Errors: MethodError when the name is taken."""
    name = key_of(cls)
    other = _REGISTRY.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise MethodError(f"a criterion named '{name}' is there already, of {other.__module__}.",
                          "Give your class another name.")
    _REGISTRY[name] = cls
    return cls


def criteria() -> dict[str, type[Criterion]]:
    """Every criterion by name, sorted."""
    _scan()
    return dict(sorted(_REGISTRY.items()))


def find_criterion(name: str) -> type[Criterion]:
    """Errors: MethodError for an unknown name; it lists those that exist."""
    known = criteria()
    if name not in known:
        raise MethodError(f"no criterion is named '{name}'.", f"There are: {listing(known)}", suggest(name, known))
    return known[name]


@cache
def _scan() -> None:
    """A criterion is known once its file was imported."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")


def as_criterion(given: Criterion | str | dict[str, Any]) -> Criterion:
    """A criterion from itself, its name, or its name and values as recipes state them."""
    if isinstance(given, Criterion):
        return given
    if isinstance(given, str):
        return find_criterion(given)()
    values = dict(given)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise MethodError("a criterion needs a name.", f"There are: {listing(criteria())}")
    return find_criterion(name)(**values)


def criterion_config(given: Criterion) -> dict[str, Any]:
    """A criterion as plain data: its name and every value."""
    return {"name": key_of(type(given)), **given.model_dump(mode="json")}
