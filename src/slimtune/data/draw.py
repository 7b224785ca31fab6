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


def few_of_sets(sets: Sequence[Sequence[Hashable]], shots: int, seed: int) -> list[int]:
    """Rows in ascending order, at least `shots` of each class, where a row may have several.

    Rows come in a drawn order, and one is kept where a class of its own has fewer than `shots` yet. Errors: DataError
    for a class that has fewer.

    Example:
        >>> [sum(name in sets[row] for row in few_of_sets(sets, 1, seed=0)) >= 1
        ...  for sets in (["ab", "b", "", "a"],) for name in "ab"]
        [True, True]
    """
    have: dict[Hashable, int] = {name: 0 for names in sets for name in names}
    order, kept = list(range(len(sets))), []
    generator(seed, "shots").shuffle(order)
    for row in order:
        if any(have[name] < shots for name in sets[row]):
            kept.append(row)
            have |= {name: have[name] + 1 for name in sets[row]}
    short = [name for name, count in have.items() if count < shots]
    if short:
        raise DataError(f"data.shots: {shots} examples of each class are asked for, and '{short[0]}' has "
                        f"{have[short[0]]} ({len(short)} classes have too few).",
                        f"Set data.shots={min(have.values())} or less.")
    return sorted(kept)


def grouped(classes: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The rows of each class, classes in the order of their first row."""
    groups: dict[Hashable, list[int]] = {}
    for row, name in enumerate(classes):
        groups.setdefault(name, []).append(row)
    return groups
