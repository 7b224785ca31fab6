"""Entities of BIO tags, as the CoNLL evaluation counts them."""
from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]


def is_bio(tags: Iterable[str]) -> bool:
    """Whether every tag is O, B-type or I-type, and at least one is not O."""
    tags = set(tags) - {"O"}
    return bool(tags) and all(tag[:2] in ("B-", "I-") and len(tag) > 2 for tag in tags)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The (type, first, last + 1) of a sentence's entities.

    B-x begins one; I-x continues one of type x, and begins one where there is none to continue.

    Example:
        >>> sorted(entities(["B-per", "I-per", "O", "I-loc", "B-loc"]))
        [('loc', 3, 4), ('loc', 4, 5), ('per', 0, 2)]
    """
    found, kind, start = set(), "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((kind, start, i))
            kind = ""
        if not kind and mark != "O":
            kind, start = name, i
    return found
