"""`slimtune methods`: every method, what it counts on a model, and its largest setting within a budget."""
import shutil
import textwrap
from typing import Annotated

import typer

from slimtune.cli.console import is_terminal, table, verb
from slimtune.errors import SlimtuneError, listing

NARROWEST = 20  # of a column of words, in characters; below it a column is left out instead


@verb
def methods(model: Annotated[str, typer.Option(help="Count each method on this model: a folder, a packaged name, "
                                                    "or ORG/NAME.")] = "",
            budget: Annotated[str | None, typer.Option(
                metavar="SIZE", help="With --model: each method's largest setting that trains at most 0.1% (of the "
                                     "backbone), 50k or 300_000 numbers.")] = None) -> None:
    """List the methods: paper, primitive, what each trains, how much; with --model, counts; --budget, settings."""
    if budget is not None:
        _within(model, budget)
    elif model:
        _counted(model)
    else:
        _show(_words(), ("method", "primitive"), leave_out=("paper", "primitive"))


def _words() -> dict[str, list[str]]:
    """The registry's columns of words."""
    from slimtune.recipe.entry import catalogue

    entries = catalogue()
    return {"method": [e.name for e in entries], "paper": [e.paper for e in entries],
            "primitive": [e.primitive for e in entries], "trains": [e.trains for e in entries],
            "formula": [e.formula for e in entries]}


def _counted(model: str) -> None:
    from slimtune.core import Count
    from slimtune.recipe.catalogue import counts

    what, found = counts(model)
    numbers = {"adapter": "{0.adapter:,}", "norms": "{0.norms:,}", "head": "{0.head:,}", "stored": "{0.stored:,}",
               "% of backbone": "{0.percent:.3f}"}
    words = _words()
    columns = {"method": words.pop("method")} | {
        name: [form.format(c) if isinstance(c, Count) else "" for c in found.values()]
        for name, form in numbers.items()} | {"note": ["" if isinstance(c, Count) else c for c in found.values()]}
    if not any(columns["note"]):
        del columns["note"]
    _show(columns | {key: words[key] for key in ("formula", "primitive", "trains", "paper")},
          ("method", *numbers, "primitive"), leave_out=("paper", "trains", "primitive", "formula", "stored"),
          title=f"{what}: numbers trained and stored by each method with its defaults")


def _within(model: str, text: str) -> None:
    from slimtune.recipe.budget import Budget, proposals, trained

    budget = Budget.parse(text)
    if not model:
        raise SlimtuneError("--budget needs a model to count on.",
                            f"For example: slimtune methods --model minilm --budget {text}")
    what, limit, found = proposals(model, budget)
    counts = [proposal.count for proposal in found]
    heads = listing(sorted({f"{count.head:,}" for count in counts if count}))
    _show({"setting": [f"'{p.override}'" if p.fits else p.name for p in found],
           "trained": [f"{trained(count):,}" if count else "" for count in counts],
           "%": [f"{100 * trained(count) / count.backbone:.4f}" if count else "" for count in counts],
           "note": [p.note for p in found]}, ("setting", "trained", "%"),
          leave_out=("%", "note"),
          title=f"{what}: each method's largest setting that trains at most {limit:,} numbers, norms included; the "
                f"head ({heads}) is apart")


def _show(columns: dict[str, list[str]], whole: tuple[str, ...], leave_out: tuple[str, ...] = (),
          title: str = "") -> None:
    """A table; on a terminal without room, words are wrapped and columns left out, which is said.

    whole: columns that are never wrapped; leave_out: those that may go, the first one first.
    """
    gone: list[str] = []
    if is_terminal():
        width = shutil.get_terminal_size().columns
        while leave_out and _share(columns, whole, width) < NARROWEST:
            gone.append(leave_out[0])
            columns, leave_out = {k: v for k, v in columns.items() if k != leave_out[0]}, leave_out[1:]
        share = max(_share(columns, whole, width), NARROWEST)
        columns = {name: cells if name in whole else [textwrap.fill(cell, share) for cell in cells]
                   for name, cells in columns.items()}
    table(list(columns), list(zip(*columns.values(), strict=True)), title)
    if gone:
        print(f"Left out at this width: {listing(reversed(gone))}")


def _share(columns: dict[str, list[str]], whole: tuple[str, ...], width: int) -> int:
    """The width of each column of words beside the whole ones, lines and margins of the table taken off."""
    taken = sum(max(map(len, (name, *cells))) for name, cells in columns.items() if name in whole)
    room = width - taken - 3 * len(columns) - 1
    words = len(columns) - sum(name in whole for name in columns)
    return room // words if words else NARROWEST + room
