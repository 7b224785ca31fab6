"""The matrix of methods and backbones: `python -m slimtune.testing.matrix` writes docs/matrix.md.

A tick stands for a pair on which every check of `check_method` passes; anything else is a refusal,
with the reason that attach gives.
"""
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from slimtune.core.method import key_of, registered
from slimtune.testing.case import Case
from slimtune.testing.check import Pair, Report, check_method, refusal
from slimtune.testing.small import small
from slimtune.testing.tiny import NAMES

PAGE = Path("docs/matrix.md")
TICK = "✓"
HEAD = """# Methods and backbones

Made by `python -m slimtune.testing.matrix`; do not edit. A tick: every check of
`slimtune.testing.check_method` passes on the tiny backbone of that family. A number: attach refuses,
for the reason below the table. Every family is loaded with the head that `slimtune.testing.tiny` gives
it: a classifier for encoders and vision, the language-model head for decoders and encoder-decoders.

"""


def matrix(reports: Iterable[Report]) -> str:
    """A markdown table: a row for each method, a column for each backbone, reasons of refusals below it.

    Errors: ValueError when a report lacks a backbone that another has: no cell is blank.
    Example:
        >>> from slimtune.methods import BitFit, LoRA
        >>> print(matrix([Report(LoRA(), {"t5": Pair("t5")}), Report(BitFit(), {"t5": Pair("t5", "No biases.")})]))
        | method | t5 |
        |---|---|
        | lora | ✓ |
        | bitfit | refused [1] |
        <BLANKLINE>
        1. No biases.
        <BLANKLINE>
    """
    rows = list(reports)
    backbones = list(dict.fromkeys(name for report in rows for name in report.pairs))
    reasons: list[str] = []
    lines = [f"| {' | '.join(['method', *backbones])} |", "|---" * (len(backbones) + 1) + "|"]
    for report in rows:
        missing = [name for name in backbones if name not in report.pairs]
        if missing:
            raise ValueError(f"{key_of(type(report.method))} was not checked on {' '.join(missing)}.")
        cells = [_cell(report.pairs[name], reasons) for name in backbones]
        lines.append(f"| {' | '.join([key_of(type(report.method)), *cells])} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), ""])


def _cell(pair: Pair, reasons: list[str]) -> str:
    if pair.refusal is None:
        return TICK
    reason = re.sub(rf"\b(this )?{re.escape(pair.backbone)}\b", "this backbone", pair.refusal)
    if reason not in reasons:
        reasons.append(reason)
    return f"refused [{reasons.index(reason) + 1}]"


def refusals() -> list[Report]:
    """Every registered method on every tiny backbone, attached only: which pairs are refused, in seconds."""
    return [Report(m, {b: Pair(b, refusal(Case(m, b))) for b in NAMES}) for m in map(small, registered().values())]


def main(page: Path = PAGE) -> int:
    """Check every pair and write the page. Errors: CheckFailure, and nothing is written, when a check fails."""
    reports = []
    for name, cls in registered().items():
        reports.append(check_method(small(cls)))
        print(f"{name}: {sum(p.seconds for p in reports[-1].pairs.values()):.0f} s", file=sys.stderr)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(HEAD + matrix(reports), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
