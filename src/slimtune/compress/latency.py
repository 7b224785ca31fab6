"""latency: how long contenders take for the same work, measured side by side in one run.

Every round runs each contender once, and the next round in another order, so that what else the machine does meets
them all alike. Times of different runs are not to be compared; ratios of one run are.
"""
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from slimtune.compress.isa import instruction_sets
from slimtune.errors import SlimtuneError

PACKAGES = ("torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and the tenth and ninetieth percentile."""

    p50: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Latency:
    """What `latency` measured: by contender, of the wall clock and of the CPU.

    speedup, cpu_speedup: the median over rounds of (time of the first contender / time of this one).
    Example:
        >>> found = latency({"a": lambda: sum(range(9999)), "b": lambda: None}, rounds=3, batch=1)
        >>> list(found.wall), found.speedup["a"], found.speedup["b"] > 1, found.setting["batch"]
        (['a', 'b'], 1.0, True, 1)
    """

    wall: dict[str, Spread]
    cpu: dict[str, Spread]
    speedup: dict[str, float]
    cpu_speedup: dict[str, float]
    rounds: int
    setting: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, self.wall))
        lines = [f"{name:<{width}}  p50 {s.p50:9.3f} ms  p10 {s.p10:9.3f}  p90 {s.p90:9.3f}  "
                 f"{self.speedup[name]:6.2f}x  CPU {self.cpu[name].p50:9.3f} ms  {self.cpu_speedup[name]:6.2f}x"
                 for name, s in self.wall.items()]
        told = " ".join(f"{key}={value}" for key, value in self.setting.items() if not isinstance(value, Mapping))
        return "\n".join([*lines, f"{self.rounds} rounds; {told}"])


def latency(callables: Mapping[str, Callable[[], Any]], rounds: int = 30, warmup: int = 3, *,
            batch: int | None = None, sequence: int | None = None, **more: Any) -> Latency:
    """Time contenders that do the same work; the first is what the others are compared with.

    batch, sequence, more: what the work was, kept in the result beside threads, instruction sets and versions.
    A contender with threads of its own says so in `more`: torch's are counted here.
    Errors: SlimtuneError for no contender or no round.
    """
    if not callables or rounds < 1:
        raise SlimtuneError(f"latency: {len(callables)} contenders and {rounds} rounds; it needs one of each.")
    wall, cpu = timed(callables, rounds, warmup, (time.perf_counter, time.process_time))
    first = next(iter(callables))
    setting = {"batch": batch, "sequence": sequence, "threads": torch.get_num_threads(), **more,
               "instruction_sets": list(instruction_sets()), "versions": versions()}
    return Latency({n: spread(t) for n, t in wall.items()}, {n: spread(t) for n, t in cpu.items()},
                   _ratios(wall, first), _ratios(cpu, first), rounds, setting)


def timed(callables: Mapping[str, Callable[[], Any]], rounds: int, warmup: int,
          clocks: Sequence[Callable[[], float]]) -> list[dict[str, list[float]]]:
    """Milliseconds of each contender in each round, by each clock, the first of which is read closest to the work."""
    names, found = list(callables), [{name: [] for name in callables} for _ in clocks]
    for _ in range(warmup):
        for name in names:
            callables[name]()
    for turn in range(rounds):
        for name in turns(names, turn):
            run, begin = callables[name], [clock() for clock in reversed(clocks)][::-1]
            run()
            for clock, start, times in zip(clocks, begin, found, strict=True):
                times[name].append(1e3 * (clock() - start))
    return found


def turns(names: Sequence[str], turn: int) -> list[str]:
    """Each contender in each place of the row as often as the others, and behind each neighbour on either side.

    Example:
        >>> [turns("ab", turn) for turn in range(4)]
        [['a', 'b'], ['b', 'a'], ['b', 'a'], ['a', 'b']]
    """
    at = turn // 2 % len(names)
    row = [*names[at:], *names[:at]]
    return row[::-1] if turn % 2 else row


def spread(times: Sequence[float]) -> Spread:
    """The median of what was measured in each round, and how far it goes."""
    p10, p50, p90 = torch.quantile(torch.tensor(times, dtype=torch.float64),
                                   torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Spread(p50, p10, p90)


def _ratios(times: Mapping[str, Sequence[float]], first: str) -> dict[str, float]:
    """Each round's ratio on its own, so that a slow moment counts for both: the median over rounds."""
    base = torch.tensor(times[first], dtype=torch.float64)
    return {name: float((base / torch.tensor(own, dtype=torch.float64).clamp(min=1e-9)).median())
            for name, own in times.items()}


def versions() -> dict[str, str]:
    """Of torch and the runtimes that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
