"""How `tune` shows its progress: a bar on a terminal, else a plain line now and then, else nothing."""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from slimtune.cli.console import is_terminal

Report = Callable[[dict[str, Any]], None]
EVERY = 10.0
"""Seconds between plain lines of the training loss."""


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """What `run` reports to."""
    if quiet:
        yield lambda event: None
    elif is_terminal():
        with _bar() as report:
            yield report
    else:
        yield _lines()


def _lines() -> Report:
    """The first loss, then one every ten seconds, and every evaluation."""
    last = -EVERY
    start = time.monotonic()

    def report(event: dict[str, Any]) -> None:
        nonlocal last
        now, kind = time.monotonic(), event["event"]
        place = f"step {event['step']}/{event['steps']}"
        if kind == "start" and event["step"]:
            print(f"{place}  resumed", flush=True)
        elif kind == "fill" and now - last >= EVERY:
            last = now
            print(f"features  {event['step']}/{event['steps']}  {now - start:.0f} s", flush=True)
        elif kind == "evaluate" or (kind == "log" and now - last >= EVERY):
            last = last if kind == "evaluate" else now
            print(f"{place}  {numbers(event)}  {now - start:.0f} s", flush=True)

    return report


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  TextColumn("{task.fields[shown]}")) as bar:
        task = bar.add_task("loading", total=None, shown="")

        def report(event: dict[str, Any]) -> None:
            what = "features" if event["event"] == "fill" else "training"
            bar.update(task, description=what, total=event["steps"], completed=event["step"])
            if event["event"] == "start" and event["step"]:
                bar.console.print(f"resumed at step {event['step']}", highlight=False)
            elif event["event"] == "log":
                bar.update(task, shown=numbers(event))
            elif event["event"] == "evaluate":
                bar.console.print(f"step {event['step']}  {numbers(event)}", highlight=False)

        yield report


def numbers(event: dict[str, Any]) -> str:
    """The figures of an event on one line.

    Example:
        >>> numbers({"event": "log", "step": 3, "steps": 9, "loss": 0.51234, "learning_rate": 1e-3})
        'loss 0.5123'
    """
    hidden = ("step", "steps", "epoch", "learning_rate", "grad_norm")
    shown = {key.replace("eval_", "validation "): value for key, value in event.items()
             if isinstance(value, int | float) and key not in hidden and not key.endswith("_per_second")}
    return "  ".join(f"{key} {value:{'.4g' if abs(value) >= 1000 else '.4f'}}" for key, value in shown.items())
