"""The folder of a run: recipe.yaml env.json metrics.jsonl checkpoint-<step>/ delta/ card.md result.json.

`result.json` is written last: a folder that has it is a finished run. Nothing of anyone is deleted.
"""
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtune.errors import RecipeError, SlimtuneError, TrainError, listing, suggest
from slimtune.recipe.parse import read_recipe, render
from slimtune.recipe.tree import Recipe
from slimtune.train.fit import FREE

try:
    import fcntl
except ImportError:  # Windows: no flock; two runs must not share a folder there
    fcntl = None

RECIPE, ENV, RESULT, CARD, DELTA = "recipe.yaml", "env.json", "result.json", "card.md", "delta"
LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and make sure that the disk has it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_text`, of JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_folder(recipe: Recipe, resume: bool) -> None:
    """That the run's folder is not there, is empty, or holds this very run; nothing is written.

    Errors: RecipeError for a folder that holds something else, another run, or (without resume) any run.
    """
    folder = recipe.folder
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output: {folder} is a file.", _other(recipe))
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    there = [name for name in names if name != LOCK and not name.startswith(f".{RECIPE}.")]
    if not there:
        return
    if RECIPE not in there:
        raise RecipeError(f"output: {folder} is not a run's folder, and is not empty.",
                          f"It has: {listing(there, 12)}", _other(recipe))
    if changed := _changed(recipe, folder):
        told = "; ".join(changed[:5]) + (f" ... ({len(changed)} in all)" if len(changed) > 5 else "")
        raise RecipeError(f"output: {folder} holds a run of another recipe.", told, _other(recipe))
    if not resume:
        raise RecipeError(f"output: {folder} holds this run already, and nothing is overwritten.",
                          "Leave out --no-resume to go on with it.", _other(recipe))


@contextlib.contextmanager
def begun(recipe: Recipe, resume: bool) -> Iterator[None]:
    """Makes the run's folder, with its recipe, and keeps other processes out of it.

    Errors: as `check_folder`; SlimtuneError when another process trains this run; TrainError when the disk fails.
    """
    with contextlib.ExitStack() as stack:
        try:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_one(recipe.folder))
            check_folder(recipe, resume)
            write_text(recipe.folder / RECIPE, render(recipe))
        except OSError as error:
            raise TrainError(f"{recipe.folder}: cannot be written: {error.strerror or error}.",
                             "Choose another folder: output=...") from error
        yield


def _changed(recipe: Recipe, folder: Path) -> list[str]:
    """What differs from the folder's recipe, but for what changes no number that is trained."""
    old, new = (flat(r.resolved()) for r in (read_recipe(folder / RECIPE), recipe))
    free = {"name", "output", *(f"train.{key}" for key in FREE)}
    return [f"{key} was {_value(old, key)}, is {_value(new, key)}" for key in {**old, **new}
            if key not in free and old.get(key) != new.get(key)]


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """A tree as dotted keys.

    Example:
        >>> flat({"method": {"rank": 4}, "seed": 0})
        {'method.rank': 4, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, node in tree.items() for k, v in flat(node, f"{key}.{name}" if key else name).items()}


def _value(tree: Mapping[str, Any], key: str) -> str:
    return str(tree[key])[:40] if key in tree else "not there"


def _other(recipe: Recipe) -> str:
    return f"Choose another folder: output={recipe.output}-2"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second process from training the same run. Errors: SlimtuneError when there is one."""
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SlimtuneError(f"{folder}: another process is training this run.",
                                "Wait for it, or choose another folder: output=...") from None
        except OSError:  # a file system without locks
            pass
        yield


def open_run(folder: Path | str) -> tuple[Path, Recipe]:
    """A run's folder and its recipe. Errors: RecipeError when it is no run, or has no delta yet."""
    path = Path(folder).expanduser()
    if not (path / RECIPE).is_file():
        raise no_run(path)
    if not (path / DELTA / "delta.json").is_file():
        raise RecipeError(f"{path}: this run is not finished; it has no delta yet.",
                          f"Go on with it: slimtune tune {path / RECIPE}, or slimtune prune for a smaller model.")
    return path, read_recipe(path / RECIPE)


def no_run(path: Path) -> RecipeError:
    """What to say of a path that is no run's folder: what it is, and where runs are."""
    home = path.absolute().parent
    above = f"The run is {home}." if (home / RECIPE).is_file() else ""
    if (path / "delta.json").is_file():
        return RecipeError(f"{path}: the folder of a delta; a run's folder is needed, which says how its data is read.",
                           above)
    if path.is_dir():
        inside = sorted(p.parent.name for p in path.glob(f"*/{RECIPE}"))
        return RecipeError(f"{path}: not the folder of a run; it has no {RECIPE}.",
                           f"Runs inside it: {listing(inside, 12)}" if inside else "", above)
    if path.exists():
        return RecipeError(f"{path}: a file, not the folder of a run.", above)
    runs = sorted(p.parent.name for p in path.parent.glob(f"*/{RECIPE}")) if path.parent.is_dir() else []
    return RecipeError(f"{path}: no such folder.", f"Runs beside it: {listing(runs, 12)}" if runs else "",
                       suggest(path.name, runs))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Errors: RecipeError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as JSON: {error}.", "Restore it, or run again elsewhere.") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: not a JSON object.", "Restore it, or run again elsewhere.")
    return value
