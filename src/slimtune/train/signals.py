"""Signals: a run that is told to stop does so after a step, and saves."""
import logging
import signal
import threading
from typing import Any

log = logging.getLogger("slimtune")


class Signals:
    """SIGINT and SIGTERM asked for the run to stop at the next step; a second one stops it at once."""

    def __init__(self) -> None:
        self.told = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: Any) -> None:
        self.told = signal.Signals(number).name
        log.warning("%s: the run stops after this step and saves a checkpoint", self.told)
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
