"""The results of a benchmark on disk: read back only for the setting they are of, and written with their machine."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimtune.errors import SlimtuneError
from slimtune.recipe.env import environment
from slimtune.recipe.folder import write_json


def recorded(path: Path, key: str, now: Mapping[str, Any], **empty: Any) -> dict[str, Any]:
    """The results on disk, or those of none: `now` under `key`, and `empty`.

    Errors: SlimtuneError for those of another setting: the next result would be written over them all.
    """
    present = json.loads(json.dumps(now))
    if not path.is_file():
        return {key: present, **empty}
    found = json.loads(path.read_text())
    then = found.get(key, {})
    if then != present:
        other = [name for name in {**present, **then} if present.get(name) != then.get(name)]
        raise SlimtuneError(f"{path}: its results are of another {key}: {', '.join(other)}.",
                            "Write elsewhere with --out FILE and --doc FILE, or delete it.")
    return found


def record(path: Path, found: dict[str, Any]) -> None:
    """Write the results, and in them the machine and the versions."""
    found["environment"] = environment()
    write_json(path, found)
