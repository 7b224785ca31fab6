"""Draws of rows by class, the same in any process for a given seed."""
import random
from collections.abc import Hashable, Sequence

from slimtune.errors import DataError


def generator(seed: int, purpose: str) -> random.Random:
    """Seeded by text, which `random` hashes with SHA-512: the same in any process."""
    return random.Random(f"slimtune/{purpose}/{seed}")


def balanced(classes: Sequence[Hashable], size: int, seed: int, purpose: str = "train_size") -> list[int]:
    """`size` rows in ascending order, as many of each class as can be.

    Every class gets as many as the others, but for one, or all that it has. Errors: DataError for too few rows.

    Example:
        >>> rows = balanced("aaaaabbbbbc", 5, seed=0)
        >>> sorted("aaaaabbbbbc"[row] for row in rows)
        ['a', 'a', 'b', 'b', 'c']
    """
    if size > len(classes):
        raise DataError(f"data.{purpose}: {size:,} examples are asked for, and there are {len(classes):,}.",
                        f"Set data.{purpose}={len(classes)} or less.")
    groups = grouped(classes)
    rng, left, drawn = generator(seed, purpose), size, []
    for done, rows in enumerate(sorted(groups.values(), key=len)):  # the small first: the others take what they lack
        count = min(len(rows), left // (len(groups) - done))
        drawn += rng.sample(rows, count)
        left -= count
    return sorted(drawn)


def few(classes: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    """`shots` rows of each class in ascending order. Errors: DataError for a class that has fewer."""
    groups = grouped(classes)
    short = [name for name, rows in groups.items() if len(rows) < shots]
    if short:
        raise DataError(f"data.shots: {shots} examples of each class are asked for, and '{short[0]}' has "
                        f"{len(groups[short[0]])} ({len(short)} classes have too few).",
                        f"Set data.shots={min(map(len, groups.values()))} or less.")
    rng = generator(seed, "shots")
    return sorted(row for rows in groups.values() for row in rng.sample(rows, shots))


def grouped(classes: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The rows of each class, classes in the order of their first row."""
    groups: dict[Hashable, list[int]] = {}
    for row, name in enumerate(classes):
        groups.setdefault(name, []).append(row)
    return groups
