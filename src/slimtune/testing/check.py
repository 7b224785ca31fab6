"""check_method: whether a method keeps the contract of core, on every tiny backbone.

One method configuration, some thirty small checks on each backbone, at most two seconds a pair. It is
what every method of this package must pass, and what the author of a new one runs first.
"""
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slimtune.core.attach import attach
from slimtune.core.fingerprint import bits_digest
from slimtune.core.method import Method
from slimtune.errors import MethodError, SiteError
from slimtune.testing import checks_attach, checks_graph, checks_run, checks_state
from slimtune.testing.case import CHECKS, Case, Check, Skip, differences, outline
from slimtune.testing.tiny import NAMES

MODULES = (checks_attach, checks_state, checks_run, checks_graph)
"""The modules whose import registers the checks, in the order in which these run."""
CHECKS.sort(key=lambda c: [m.__name__ for m in MODULES].index(c.run.__module__))


class CheckFailure(AssertionError):  # noqa: N818
    """A method that breaks its contract: which method, on which backbone, in which check."""

    def __init__(self, method: Method, backbone: str, check: str, why: str) -> None:
        super().__init__(f"{type(method).__name__} on {backbone}: {check}: {why}\n  The configuration: {method!r}")
        self.method, self.backbone, self.check, self.why = method, backbone, check, why


@dataclass
class Pair:
    """What was found for one backbone.

    refusal: why attach refused, or None; passed: names of checks; skipped: name -> reason; notes: worth knowing.
    """

    backbone: str
    refusal: str | None = None
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Report:
    """What check_method found, by backbone; print it, or give many to `testing.matrix.matrix`."""

    method: Method
    pairs: dict[str, Pair] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [repr(self.method)]
        for pair in self.pairs.values():
            if pair.refusal is not None:
                lines.append(f"  {pair.backbone:11s} refused: {pair.refusal}")
                continue
            lines.append(f"  {pair.backbone:11s} {len(pair.passed)} checks passed, {len(pair.skipped)} do not apply "
                         f"({pair.seconds:.1f} s)")
            lines += [f"    note: {note}" for note in pair.notes]
        return "\n".join(lines)


def check_method(method: Method, backbones: Iterable[str] = NAMES, *, slow: bool = False,
                 only: Iterable[str] | None = None) -> Report:
    """Run every check on every backbone, and report what passed, what was refused and why.

    slow: compile and export as well, which take seconds; only: these checks, by name.
    A MethodError or SiteError at attach is a refusal, and the model must then be as it was.
    Errors: CheckFailure at the first check that fails; it names method, backbone and check.
    Example:
        >>> from slimtune.methods import IA3
        >>> report = check_method(IA3(), ["bert"])
        >>> len(report.pairs["bert"].passed) >= 25
        True
    """
    report = Report(method)
    for backbone in backbones:
        report.pairs[backbone] = _check_pair(method, backbone, list(_chosen(slow, only)))
    return report


def _chosen(slow: bool, only: Iterable[str] | None) -> Iterator[Check]:
    wanted = None if only is None else set(only)
    unknown = (wanted or set()) - {c.name for c in CHECKS}
    if unknown:
        raise ValueError(f"no check is named {sorted(unknown)}; there are: {' '.join(c.name for c in CHECKS)}")
    for c in CHECKS:
        if c.name in wanted if wanted is not None else slow or not c.slow:
            yield c


def _check_pair(method: Method, backbone: str, checks: list[Check]) -> Pair:
    started = time.perf_counter()
    pair, case = Pair(backbone), Case(method, backbone)
    pair.refusal = refusal(case)
    if pair.refusal is None:
        for c in checks:
            try:
                c.run(case)
                pair.passed.append(c.name)
            except Skip as reason:
                pair.skipped[c.name] = str(reason)
            except Exception as problem:
                why = str(problem) if type(problem) is AssertionError else f"{type(problem).__name__}: {problem}"
                raise CheckFailure(method, backbone, c.name, why) from problem
    pair.notes, pair.seconds = case.notes, time.perf_counter() - started
    return pair


def refusal(case: Case) -> str | None:
    """Why attach refuses the method on this backbone, or None. Errors: CheckFailure for any other error."""
    model = case.base()
    before, digest = outline(model), bits_digest(model)
    try:
        attach(model, case.method)
    except (MethodError, SiteError) as reason:
        where = differences(before, outline(model)) or (["its values"] if bits_digest(model) != digest else [])
        if where:
            why = f"the refusal changed the model at {where[:6]}"
            raise CheckFailure(case.method, case.backbone, "refusal", why) from reason
        return reason.what
    except Exception as problem:
        raise CheckFailure(case.method, case.backbone, "attaches", f"{type(problem).__name__}: {problem}") from problem
    return None
