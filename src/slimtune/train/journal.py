"""metrics.jsonl: one JSON object a line, appended as a run goes; a resumed run drops what came after."""
import json
import math
import os
from pathlib import Path
from typing import Any

from slimtune.errors import TrainError

NAME = "metrics.jsonl"


class Journal:
    """The metrics file of a run's folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     journal = Journal(Path(home))
        ...     journal.add({"step": 1, "loss": 2.0})
        ...     journal.add({"step": 2, "loss": 1.0})
        ...     journal.rewind(1)
        ...     journal.lines()
        [{'step': 1, 'loss': 2.0}]
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. A number that JSON does not have becomes null. Errors: TrainError when the disk fails."""
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in line.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainError(f"{self.path}: could not be written: {error.strerror}.",
                             "Make room, then run again: it resumes from its last checkpoint.") from error

    def lines(self) -> list[dict[str, Any]]:
        """The lines that are whole; a killed process may have left half of one."""
        found: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    value = json.loads(text)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    found.append(value)
        return found

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, by one rename."""
        if not self.path.is_file():
            return
        kept = [line for line in self.lines() if line.get("step", 0) <= step]
        new = self.path.with_name(f".new-{NAME}")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            raise TrainError(f"{self.path}: could not be rewritten: {error.strerror}.") from error
