"""The tables of methods in README.md and docs/methods.md: `python -m slimtune.testing.tables` rewrites them.

Rows come from the registry, words from the methods' docstrings, numbers from attaching each method to a
backbone of real size on the meta device. What stands outside the two marks of a table is left alone.
"""
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import nn

from slimtune.bench.page import renewed
from slimtune.core import Count, attach, dissect
from slimtune.core.method import Method, registered
from slimtune.errors import MethodError, SlimtuneError
from slimtune.recipe.budget import sizes_of
from slimtune.recipe.catalogue import count_of
from slimtune.recipe.entry import Entry, entry
from slimtune.testing import meta
from slimtune.testing.small import small
from slimtune.testing.tiny import tiny

OPEN = "<!-- methods: made by python -m slimtune.testing.tables -->"
CLOSE = "<!-- end of methods -->"
BACKBONES = {"BERT-base": ("bert", meta.bert_base_meta), "ViT-B/16": ("vit", meta.vit_b16_meta),
             "T5-base": ("t5", meta.t5_base_meta)}
"""What a method is counted and merged on: the first that it can go on."""


def own() -> dict[str, type[Method]]:
    """The methods of slimtune itself, by name."""
    return {name: cls for name, cls in registered().items() if cls.__module__.startswith("slimtune.methods.")}


def short() -> str:
    """README's table: name, paper, primitive, what is trained."""
    rows = [[f"`{e.name}`", _linked(e.who, e), e.primitive, e.trains] for e in _entries()]
    return markdown(["name", "paper", "primitive", "trains"], rows)


def full() -> str:
    """The table of docs/methods.md: also the formula, the count, the start, and merging."""
    rows = []
    for e in _entries():
        cls = own()[e.name]
        paper = ", ".join(part for part in (e.who, _linked(e.title or e.number, e)) if part)
        rows.append([f"`{e.name}`", paper, e.primitive, e.trains, e.formula, counted(cls),
                     "yes" if cls().starts_as_identity() else "no", mergeable(cls)])
    return markdown(["name", "paper", "primitive", "trains", "formula", "count (BERT-base)", "identity at start",
                     "mergeable"], rows)


TABLES: dict[Path, Callable[[], str]] = {Path("README.md"): short, Path("docs/methods.md"): full}


def _entries() -> list[Entry]:
    return [entry(name, cls) for name, cls in own().items()]


def _linked(text: str, e: Entry) -> str:
    return f"[{text}]({e.link})" if e.link else text


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in markdown.

    Example:
        >>> print(markdown(["a", "b"], [["1 | 2", "3 * 4"]]))
        | a | b |
        |---|---|
        | 1 \\| 2 | 3 \\* 4 |
        <BLANKLINE>
    """
    cells = [[re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
                      *(f"| {' | '.join(row)} |" for row in cells), ""])


def counted(cls: type[Method]) -> str:
    """What a method trains by default, at which size: '294,912 (rank 8)'; the backbone unless it is BERT-base."""
    for backbone, (_, build) in BACKBONES.items():
        net = _kept(build)
        count = count_of(net, cls, dissect(net))
        if isinstance(count, Count):
            sizes = ", ".join(f"{s.field} {s.default}" for s in sizes_of(net, dissect(net), cls, {}))
            return (f"{count.adapter:,}" + (f" + {count.norms:,} norms" if count.norms else "")
                    + (f" ({sizes})" if sizes else "") + (f" on {backbone}" if backbone != "BERT-base" else ""))
    return "-"


def mergeable(cls: type[Method]) -> str:
    """Whether a small one can be folded into a tiny backbone's weights; what trains those is in place already."""
    if cls.primitive == "unfreeze":
        return "in place"
    for family, _ in BACKBONES.values():
        try:
            delta = attach(tiny(family), small(cls))
        except SlimtuneError:
            continue
        try:
            delta.merge()
        except MethodError:
            return "no"
        return "yes"
    return "-"


@cache
def _kept(build: Callable[[], nn.Module]) -> nn.Module:
    return build()


def rewritten(page: str, table: str) -> str:
    """A page with its table replaced. Errors: SlimtuneError when it has not exactly one pair of marks."""
    return renewed(page, (OPEN, CLOSE), table)


def main(root: Path = Path()) -> int:
    """Rewrite every table."""
    for path, table in TABLES.items():
        page = root / path
        page.write_text(rewritten(page.read_text(encoding="utf-8"), table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
