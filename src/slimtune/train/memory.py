"""Peak memory of this process while a run lasts."""
import contextlib
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """MiB of resident memory: at the start, and the peak since then.

    Linux lets the high-water mark be reset; elsewhere the peak is that of the whole process so far.

    Example:
        >>> memory = PeakMemory()
        >>> memory.peak() >= memory.start >= 0
        True
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        self.start = _read("VmRSS")

    def peak(self) -> float:
        """The highest since the start."""
        return max(_read("VmHWM"), self.start)


def _read(field: str) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:                                     # Windows
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 << 20 if sys.platform == "darwin" else 1 << 10)
