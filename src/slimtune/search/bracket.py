"""The smallest whole number that passes a costly test: powers of two times a start, then bisection."""
from collections.abc import Callable


def smallest(passes: Callable[[int], bool], start: int, most: int, bisections: int) -> int | None:
    """The smallest number found that passes; None when none up to `most` does. 0 is taken to fail.

    passes: true from some number on, or nearly so. start, 2 start, 4 start ... and `most` itself are tried until one
    passes; then the middle between it and the last that failed, `bisections` times.
    Example:
        >>> smallest(lambda d: d >= 37, 4, 1000, 2), smallest(lambda d: d >= 37, 4, 1000, 10)
        (40, 37)
    """
    low = 0
    for high in _steps(start, most):
        if passes(high):
            break
        low = high
    else:
        return None
    for _ in range(bisections):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def tries(start: int, most: int, bisections: int) -> int:
    """How often `smallest` asks at most.

    Example:
        >>> tries(8, 64, 2)
        6
    """
    return len(_steps(start, most)) + bisections


def _steps(start: int, most: int) -> list[int]:
    found = [min(start, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found
