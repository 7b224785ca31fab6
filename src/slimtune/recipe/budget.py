"""budget: the largest setting of a method whose trained numbers stay within a budget.

A method's size is one integer field of its config (rank, bottleneck, length ...), found by trying which of
them changes the count. Counts are exact: the method is attached to the model's shapes each time.
"""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain, islice
from typing import TypeAlias

from annotated_types import Ge, Gt
from torch import nn

from slimtune.core import Anatomy, Count, dissect
from slimtune.core.tokens import Prompt
from slimtune.errors import SiteError, SlimtuneError
from slimtune.methods import Method, get, registered
from slimtune.recipe.catalogue import count_of, reason, skeleton

PREFERRED = ("rank", "bottleneck", "length", "reduction", "division", "values")
"""Which field is a method's size when several change its count; others come behind, in their own order."""
LARGEST = 2**20
WINDOW = 256  # values tried in a row before a range counts as impossible: the gap between divisors of a width
Numbers: TypeAlias = Callable[[int], int | None]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True)
class Budget:
    """Numbers that may be trained: so many, or a share of the backbone's.

    Example:
        >>> Budget.parse("0.1%").of(109_482_240), Budget.parse("50k").of(1), Budget.parse("300_000").of(1)
        (109482, 50000, 300000)
    """

    amount: Fraction
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Errors: SlimtuneError for what is no budget; it says what is accepted."""
        found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([kmgb%]?)", text.strip().lower(), re.ASCII)
        amount = Fraction(re.sub("[_,]", "", found[1])) if found else Fraction(0)
        is_share = found is not None and found[2] == "%"
        if found is not None and not is_share:
            amount *= _UNITS[found[2]]
        if amount <= 0 or (amount > 100 if is_share else amount < 1):
            raise SlimtuneError(f"--budget {ascii(text)[1:-1][:60]}: not a budget.",
                                "It takes a share of the backbone's parameters, above 0% and up to 100%, such as 0.1%, "
                                "or a number of parameters, 1 or more, such as 300_000, 50k or 1.5M.")
        return cls(amount / 100 if is_share else amount, is_share)

    def of(self, backbone: int) -> int:
        """In numbers, rounded down."""
        return int(self.amount * backbone) if self.is_share else int(self.amount)


@dataclass(frozen=True)
class Proposal:
    """A method's largest setting within the budget.

    count: of that setting, or the least there is when `fits` is false, or None where the method cannot go;
    note: why it does not fit, or what else than the budget bounds it.
    """

    name: str
    setting: dict[str, int]
    count: Count | None
    fits: bool
    note: str = ""

    @property
    def override(self) -> str:
        """As the command line takes it.

        Example:
            >>> Proposal("lora", {"rank": 4}, None, True).override
            'method={name: lora, rank: 4}'
        """
        return f"method={{{', '.join([f'name: {self.name}', *(f'{k}: {v}' for k, v in self.setting.items())])}}}"


def trained(count: Count) -> int:
    """What a budget limits: a method's own numbers and the norms beside it, not the head."""
    return count.adapter + count.norms


def proposals(model: str, budget: Budget) -> tuple[str, int, list[Proposal]]:
    """What is counted, the budget in numbers, and each method's proposal, by name. No weights are read.

    Errors: SlimtuneError for an unknown model.
    """
    net = skeleton(model)
    whole = count_of(net, get("full"), dissect(net), head="none")
    if not isinstance(whole, Count):
        raise whole
    limit = budget.of(whole.backbone)
    return f"{type(net).__name__} ({model})", limit, [propose(name, cls, net, limit)
                                                      for name, cls in registered().items()]


def propose(name: str, cls: type[Method], net: nn.Module, limit: int) -> Proposal:
    """One method's largest setting that trains at most `limit` numbers on a model."""
    anatomy = dissect(net)
    base = base_of(net, anatomy, cls)
    sizes = sizes_of(net, anatomy, cls, base)
    if not sizes:
        count = count_of(net, cls, anatomy, **base)
        if not isinstance(count, Count):
            return Proposal(name, {}, None, False, reason(count))
        fits = trained(count) <= limit
        return Proposal(name, base, count, fits, "" if fits else "it has no size to set")
    first = sizes[0]
    value, fits = search(first.numbers, first.start, limit)
    kept = ", ".join(f"{other.field} kept at {other.default}" for other in sizes[1:])
    note = "" if fits else f"the least, at {first.field}: {value}" + (f" with {kept}" if kept else "")
    if fits and value == first.most:  # where the numbers end, which may be below the bound
        most = first.numbers(value)
        value = _close_in(first.numbers, lambda v: first.numbers(v) == most, value, 0)
        note = f"no more than {first.bound}" if value == first.most else f"more {first.field} adds no numbers"
    count = first.count(value)
    assert isinstance(count, Count)
    return Proposal(name, {**base, first.field: value}, count, fits, note)


def base_of(net: nn.Module, anatomy: Anatomy, cls: type[Method]) -> dict[str, int]:
    """What is set before any search: nothing, or one size by which a method's defaults become possible on a model."""
    refusal = count_of(net, cls, anatomy)
    if isinstance(refusal, Count | SiteError):
        return {}
    sizes = (Sizes(net, anatomy, cls, field, {}) for field in size_fields(cls))
    return next(({s.field: s.start} for s in sizes if s.possible), {})


def sizes_of(net: nn.Module, anatomy: Anatomy, cls: type[Method], base: dict[str, int]) -> list["Sizes"]:
    """The fields that change a method's count on a model; the first is its size."""
    if isinstance(count_of(net, cls, anatomy, **base), Exception):
        return []
    found = [Sizes(net, anatomy, cls, field, base) for field in size_fields(cls)]
    return [s for s in found if s.possible and other(s.numbers, s.start) is not None]


def size_fields(cls: type[Method]) -> list[str]:
    """The fields that may set a method's size: integers of at least 1, the usual ones first.

    Example:
        >>> from slimtune.methods import LoRA
        >>> size_fields(LoRA)
        ['rank']
    """
    found = [name for name, field in cls.model_fields.items() if field.annotation is int and any(
        (isinstance(m, Ge) and m.ge == 1) or (isinstance(m, Gt) and m.gt == 0) for m in field.metadata)]
    return sorted(found, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED))


class Sizes:
    """A method's counts on one model by the value of one of its fields.

    base: values of other fields; default: the field's own, or what base says; most: the largest value of use, and
    `bound`, what that is; start: the value nearest to the default that is possible; possible: whether there is one.
    """

    def __init__(self, net: nn.Module, anatomy: Anatomy, cls: type[Method], field: str, base: dict[str, int]) -> None:
        self.field, self.most, self.bound = field, LARGEST, f"{LARGEST:,}"
        self.count = cache(lambda value: count_of(net, cls, anatomy, **{**base, field: value}))
        positions = getattr(getattr(net, "config", None), "max_position_embeddings", None)
        if field in ("rank", "bottleneck"):
            self.bound = "the width of the widest layer"
            self.most = max(max(s.d_in, s.d_out) for s in anatomy.sites if s.role not in ("embed", "head"))
        elif field == "length" and positions and issubclass(cls, Prompt):
            self.most, self.bound = positions // 2, f"half of the {positions} positions, which the text shares"
        self.default: int = base[field] if field in base else cls.model_fields[field].default
        start = _first(self.numbers, (self.default + i // 2 * (-1) ** i for i in range(1, WINDOW)))
        self.start, self.possible = start or 1, start is not None

    def numbers(self, value: int) -> int | None:
        """Numbers trained at a value; None where it is not possible."""
        found = self.count(value) if 1 <= value <= self.most else None
        return trained(found) if isinstance(found, Count) else None


def other(numbers: Numbers, start: int) -> int | None:
    """A value whose numbers are not those of `start`; None when the field changes nothing."""
    near = chain((2 * start, start // 2), range(start + 1, 2 * start), range(start - 1, 0, -1))
    possible = (value for value in islice(near, WINDOW) if numbers(value) is not None)
    return next((value for value in islice(possible, 4) if numbers(value) != numbers(start)), None)


def search(numbers: Numbers, start: int, limit: int) -> tuple[int, bool]:
    """The value with the most numbers within a limit, and true; or that with the fewest, and false.

    numbers: monotone where it is not None, and not the same everywhere. Doubling or halving from `start`
    brackets the limit and bisection closes in, past values that are not possible.
    Example:
        >>> search(lambda rank: 1_000 * rank, 8, 4_500), search(lambda r: 960 // r if 960 % r == 0 else None, 8, 100)
        ((4, True), (10, True))
    """
    def fits(value: int) -> bool:
        return (found := numbers(value)) is not None and found <= limit

    compared = other(numbers, start)
    assert compared is not None
    grows = (numbers(compared) or 0) > (numbers(start) or 0) if compared > start else (
        (numbers(compared) or 0) < (numbers(start) or 0))
    fitted = fits(start)
    up = grows == fitted
    near, far = start, _first(numbers, _beyond(start, up))
    while far is not None and fits(far) == fitted:
        near, far = far, _first(numbers, _beyond(far, up))
    if far is None:
        far = _close_in(numbers, lambda value: True, near, 2 * near if up else 0)
        if fits(far) == fitted:
            return far, fitted
    return (_close_in(numbers, fits, near, far) if fitted else _close_in(numbers, fits, far, near)), True


def _close_in(numbers: Numbers, holds: Callable[[int], bool], inside: int, outside: int) -> int:
    """The last possible value from `inside`, where something holds, towards `outside`, where it does not."""
    while abs(outside - inside) > 1:
        value = _first(numbers, _between(inside, outside))
        if value is None and abs(outside - inside) <= WINDOW:
            break
        if value is not None and holds(value):
            inside = value
        else:  # a whole window of values that are not possible counts as outside
            outside = (inside + outside) // 2 if value is None else value
    return inside


def _beyond(value: int, up: bool) -> Iterable[int]:
    """Values to go on to: the double or the half and what is further, then what is nearer."""
    if up:
        return chain(islice(range(2 * value, 4 * value), WINDOW), range(2 * value - 1, value, -1))
    return chain(islice(range(value // 2, 0, -1), WINDOW), range(value // 2 + 1, value))


def _between(one: int, two: int) -> Iterable[int]:
    """The values strictly between, from the middle outwards."""
    low, high = sorted((one, two))
    middle = (low + high) // 2
    return (v for v in (middle + i // 2 * (-1) ** i for i in range(1, 2 * (high - low))) if low < v < high)


def _first(numbers: Numbers, values: Iterable[int]) -> int | None:
    """The first value that is possible, among so many tries."""
    return next((value for value in islice(values, 2 * WINDOW) if numbers(value) is not None), None)
