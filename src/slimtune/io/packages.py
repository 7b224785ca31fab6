"""Files inside installed packages, found without importing the package."""
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def installed(name: str, inside: str) -> Path | None:
    """The path of a file or folder of an installed distribution, or None; none of its code runs.

    Example:
        >>> installed("no-such-distribution", "x") is None
        True
    """
    try:
        path = Path(str(distribution(name).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None
