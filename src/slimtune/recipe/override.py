"""Overrides: `method.rank=4`, `data.labels=[a,b]`, `method.0.rank=4`, set on a document before it is checked."""
from collections.abc import Iterable
from typing import Any

from slimtune.errors import RecipeError, listing
from slimtune.recipe.document import Document, Key, dotted, parse_value


def apply_overrides(document: Document, overrides: Iterable[str]) -> None:
    """Set each `a.b=value` in turn; the value is YAML: a scalar, [a list] or {a: mapping}.

    Errors: RecipeError for what is not of this form, and for a path through a value that holds no keys.

    Example:
        >>> document = Document("recipe.yaml", {"method": [{"name": "lora"}]})
        >>> apply_overrides(document, ["method.0.rank=4", "train.steps=10"])
        >>> document.tree
        {'method': [{'name': 'lora', 'rank': 4}], 'train': {'steps': 10}}
    """
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"override {ascii(text)[:100]}: not of the form a.b=value.",
                              "For example: train.epochs=3 method.rank=4 data.labels=[no,yes]")
        _set(document, parts, value, f"override {ascii(name)[1:-1][:100]}")


def _set(document: Document, parts: list[str], value: str, name: str) -> None:
    node: Any = document.tree
    key: Key = ()
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            index = _index(part, len(node), name, key)
            key = (*key, index)
            if last:
                node[index] = _value(document, key, value, name)
            elif isinstance(node[index], str) and key[0] == "method":
                node[index] = {"name": node[index]}
            node = node[index]
        elif isinstance(node, dict):
            key = (*key, part)
            if last:
                node[part] = _value(document, key, value, name)
            elif isinstance(node.get(part), str) and part == "method":  # `method: lora` is short for its name
                node[part] = {"name": node[part]}
            elif node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise RecipeError(f"{name}: {dotted(key)} is {ascii(node)[:60]}, which has no keys.",
                              f"Set it as a whole: {dotted(key)}=...")


def _value(document: Document, key: Key, text: str, name: str) -> Any:
    for old in [k for k in document.lines if k[:len(key)] == key]:
        del document.lines[old]
    document.given.add(key)
    return parse_value(text, name, key, document)


def _index(part: str, size: int, name: str, key: Key) -> int:
    if not part.isdecimal() or len(part) > 6 or int(part) >= size:
        raise RecipeError(f"{name}: {dotted(key)} is a list of {size}, which has no '{ascii(part)[1:-1][:40]}'.",
                          f"It has: {listing(str(i) for i in range(size)) or 'nothing'}")
    return int(part)
