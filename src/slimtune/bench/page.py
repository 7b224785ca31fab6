"""What the pages of benchmarks have in common: a part between two marks that is made, and a mean with its spread."""
from collections.abc import Sequence
from statistics import mean, stdev

from slimtune.errors import SlimtuneError


def renewed(page: str, marks: tuple[str, str], made: str) -> str:
    """A page with what stands between its two marks replaced; an empty page gets the marks.

    Errors: SlimtuneError when it has not exactly one pair of marks.

    Example:
        >>> renewed("mine <old> mine", ("<", ">"), "new")
        'mine <\\nnew\\n> mine'
    """
    begin, end = marks
    before, opened, rest = (page or f"{begin}{end}\n").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed or begin in after or end in before + after:
        raise SlimtuneError(f"the page needs one pair of marks: {begin} and {end}", "Put them where the table goes.")
    return f"{before}{begin}\n{made.rstrip()}\n{end}{after}"


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and sample standard deviation.

    Example:
        >>> spread([0.5, 0.7]), spread([0.5]), spread([2.0, 3.0], 1, "+")
        ('0.600 ± 0.141', '0.500', '+2.5 ± 0.7')
    """
    return f"{mean(values):{sign}.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
