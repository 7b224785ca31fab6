"""units: what one head, and one neuron, of a model costs on this machine, for a budget of latency.

    t_k = a + c u_k;    c = sum_k (u_k - mean u) t_k / sum_k (u_k - mean u)^2

t_k are the milliseconds of a forward with u_k units of one kind left, the others really sliced out. Every round times
the whole model and all smaller ones side by side and gives a slope of its own; the median over rounds is c.
"""
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.compress.isa import instruction_sets
from slimtune.compress.latency import Spread, spread, timed, versions
from slimtune.core import dissect
from slimtune.errors import MethodError, SlimtuneError, listing, suggest
from slimtune.sparsity.kept import ROLES, units
from slimtune.sparsity.shrink import Shrunk, shrink

WHOLE = "whole"


@dataclass(frozen=True)
class UnitTimes:
    """Milliseconds that one unit of each kind adds to a forward.

    each: by kind, what Budget(unit="latency", each=...) takes. spread: of the slopes of the rounds.
    left: how many units of a kind the models had that were timed, all of them first. whole: time of the whole model.
    """

    each: dict[str, float]
    spread: dict[str, Spread]
    left: dict[str, tuple[int, ...]]
    whole: Spread
    rounds: int
    setting: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.each))
        lines = [f"{kind:<{width}}  p50 {s.p50:10.6f} ms  p10 {s.p10:10.6f}  p90 {s.p90:10.6f}  x {self.left[kind][0]}"
                 f" = {s.p50 * self.left[kind][0]:.3f} ms" for kind, s in self.spread.items()]
        told = " ".join(f"{key}={value}" for key, value in self.setting.items() if not isinstance(value, Mapping))
        return "\n".join([*lines, f"of {self.whole.p50:.3f} ms a forward, {self.rounds} rounds; {told}"])


def unit_times(model: nn.Module, inputs: Mapping[str, Any] | Tensor, kinds: Sequence[str] | None = None, *,
               shares: Sequence[float] = (0.25, 0.5, 0.75), rounds: int = 30, warmup: int = 3,
               clock: Callable[[], float] = time.perf_counter) -> UnitTimes:
    """Measure what one unit of each kind costs on this machine; the model stays as it is.

    inputs: a batch as it will be met; the times hold for its size and length. kinds: "attn.heads" and "mlp.act", by
    default what the model has. shares: of each layer's units that are left in the smaller models, for a kind. Active
    deltas are folded in, as by `shrink`. clock: in seconds; time.process_time where others use the machine too.
    A unit is taken to cost the same in each layer. Times beside the units, such as of embeddings, are in no cost.

    Errors: MethodError for a kind that the model does not have, or what cannot be sliced; SlimtuneError for a model
    that is not on the CPU, where there is nothing to leave out, and when no cost shows above the noise.
    Example:
        >>> from slimtune.testing import batch, tiny
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> with FlopCounterMode(display=False) as flops:   # counted, for this page; leave the clock out to measure
        ...     times = unit_times(tiny("bert"), batch("bert"), ["mlp.act"], rounds=3, clock=flops.get_total_flops)
        >>> times.left, times.each   # 2 * 3 * 7 tokens * 2 * 32, and a thousand of it
        ({'mlp.act': (128, 96, 64, 32)}, {'mlp.act': 2688000.0})
    """
    if odd := next((p.device.type for p in model.parameters() if p.device.type != "cpu"), None):
        raise SlimtuneError(f"unit_times: the model is on {odd}; times are measured on the CPU.")
    if rounds < 1 or not shares or not all(0 < share < 1 for share in shares):
        raise SlimtuneError(f"unit_times: {rounds} rounds and shares={tuple(shares)}; it needs a round, and shares of "
                            "the units that are left between 0 and 1.")
    sites = _sites(model, kinds)
    models, left = {}, dict[str, list[int]]()
    with _lent(model) as twin:
        models[WHOLE], report = twin({}, inputs)
        for kind, own in sites.items():
            left[kind] = [_count(report, own)]
            for share in sorted(shares, reverse=True):
                made, now = twin({n: range(max(1, round(share * most))) for n, most in own.items()}, inputs)
                if _count(now, own) < left[kind][-1]:
                    models[f"{kind}:{len(left[kind])}"] = made
                    left[kind].append(_count(now, own))
    if flat := [kind for kind, numbers in left.items() if len(numbers) < 2]:
        raise SlimtuneError(f"unit_times: no layer can do with fewer units of {flat[0]}.",
                            "Say kinds= without it, or other shares.")
    with torch.no_grad():
        [times] = timed({n: _call(m.eval(), inputs) for n, m in models.items()}, rounds, warmup, [clock])
    slopes = {kind: spread(_slopes([times[WHOLE], *(times[f"{kind}:{i}"] for i in range(1, len(numbers)))], numbers))
              for kind, numbers in left.items()}
    return UnitTimes(_positive(slopes), slopes, {kind: tuple(n) for kind, n in left.items()}, spread(times[WHOLE]),
                     rounds, _setting(inputs))


def _sites(model: nn.Module, kinds: Sequence[str] | None) -> dict[str, dict[str, int]]:
    """The sites of each kind, and how many units each has."""
    found: dict[str, dict[str, int]] = {}
    for site in dissect(model).sites:
        if site.role in ROLES:
            found.setdefault(site.role, {})[site.name] = units(site)
    if odd := [kind for kind in kinds or () if kind not in found]:
        raise MethodError(f"unit_times: this model has no units of '{odd[0]}'.", f"It has: {listing(found)}",
                          suggest(odd[0], found))
    return {kind: found[kind] for kind in found if kinds is None or kind in kinds}


@contextmanager
def _lent(model: nn.Module) -> Iterator[Callable[..., tuple[nn.Module, Shrunk]]]:
    """What makes smaller twins of a model, which share all tensors with it that are not sliced; none is written to."""
    needed = [(p, p.requires_grad) for p in model.parameters()]

    def twin(keep: Mapping[str, range], inputs: Mapping[str, Any] | Tensor) -> tuple[nn.Module, Shrunk]:
        made = deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        return made, shrink(made, keep, inputs=inputs)

    try:
        yield twin
    finally:
        for p, was in needed:
            p.requires_grad_(was)


def _count(report: Shrunk, sites: Mapping[str, int]) -> int:
    return sum((report.heads | report.neurons).get(name, 0) for name in sites)


def _call(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Callable[[], Any]:
    return lambda: model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _slopes(times: Sequence[Sequence[float]], left: Sequence[int]) -> list[float]:
    """The slope of each round. Shapes: times (models, rounds); left (models)."""
    u = torch.tensor(left, dtype=torch.float64)
    u = u - u.mean()
    return ((u @ torch.tensor(times, dtype=torch.float64)) / u.square().sum()).tolist()


def _positive(slopes: Mapping[str, Spread]) -> dict[str, float]:
    for kind, s in slopes.items():
        if not s.p50 > 0:
            raise SlimtuneError(f"unit_times: no cost of {kind} shows above the noise: {s.p50:.6f} ms a unit, "
                                f"{s.p10:.6f} to {s.p90:.6f} by round.",
                                "Take a larger batch, more rounds, or clock=time.process_time if the machine is busy.")
    return {kind: s.p50 for kind, s in slopes.items()}


def _setting(inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    named = inputs if isinstance(inputs, Mapping) else {"input": inputs}
    shapes = {name: tuple(t.shape) for name, t in named.items() if isinstance(t, Tensor)}
    return {"shapes": shapes, "threads": torch.get_num_threads(), "instruction_sets": list(instruction_sets()),
            "versions": versions()}
