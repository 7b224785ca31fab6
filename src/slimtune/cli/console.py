"""What verbs share: errors as exit codes, logging, and tables that are plain text where no terminal is."""
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import ParamSpec

import typer

from slimtune.errors import SlimtuneError

P = ParamSpec("P")
INTERRUPTED = 3
log = logging.getLogger("slimtune")
_TOO_LARGE = ("allocate memory", "out of memory", "not enough memory", "overflowed")  # as torch words it
_MEMORY = "no memory left: lower train.batch_size, data.max_length, or the size of the method."


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """A verb whose errors become a message on stderr and an exit code; a traceback only with SLIMTUNE_DEBUG=1."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except SlimtuneError as error:
            raise _stop(f"{type(error).__name__}: {error}", error.exit_code) from None
        except KeyboardInterrupt:
            raise _stop("Interrupted.", INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  so that the exit does not flush into it
            raise typer.Exit(0) from None
        except (OSError, MemoryError) as error:
            raise _stop(f"{type(error).__name__}: {str(error) or _MEMORY}", 1) from None
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            advice = _MEMORY if any(sign in first for sign in _TOO_LARGE) else (
                "This may be a fault of slimtune. Set SLIMTUNE_DEBUG=1 to see where it happened.")
            raise _stop(f"{type(error).__name__}: {first[:500]}\n  {advice}", 1) from None

    return run


def _stop(message: str, code: int) -> typer.Exit:
    if os.environ.get("SLIMTUNE_DEBUG") == "1":
        traceback.print_exc()
    sys.stdout.flush()
    print(message.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    return typer.Exit(code)


def set_logging(level: int = logging.WARNING) -> None:
    """slimtune's log on stderr, a plain line each."""
    log.handlers.clear()
    log.propagate = False
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(level)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the time: a progress bar puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def is_terminal() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table: drawn on a terminal, else aligned columns without lines. A column of numbers stands right."""
    right = [all(_is_number(row[i]) for row in rows if row[i]) for i in range(len(columns))]
    if is_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, title_justify="left")
        for name, numbers in zip(columns, right, strict=True):
            drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    if title:
        print(title)
    for row in (columns, *rows) if any(columns) else rows:
        cells = [cell.rjust(width) if numbers else cell.ljust(width)
                 for cell, width, numbers in zip(row, widths, right, strict=True)]
        print("  ".join(cells).rstrip())


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?[\d,.]+( [kMGT]?B)?|undefined", cell) is not None


def size(count: float) -> str:
    """Bytes for people.

    Example:
        >>> size(302_212), size(91_000_000)
        ('302.2 kB', '91.0 MB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
