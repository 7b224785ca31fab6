"""Document: a recipe's text as plain data, and the line of every key.

YAML is data only. Scalars follow YAML 1.2 (`no` and `on` are texts, `1e-3` is a number); tags, anchors,
aliases, repeated keys and numbers that are not finite are refused; size, depth and the number of values
are bounded, so that no text takes long.
"""
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from slimtune.errors import RecipeError, listing, suggest

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 64 * 1024, 16, 5000
Key = tuple[str | int, ...]
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """name: how errors call it; tree: its data; lines: the line of each key; given: keys set by an override."""

    name: str
    tree: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    given: set[Key] = field(default_factory=set)

    def error(self, key: Key, what: str, *more: str) -> RecipeError:
        """`recipe.yaml: method.ranks: no such key for LoRA (line 4).` and what to do."""
        if any(key[:i] in self.given for i in range(len(key) + 1)):
            return RecipeError(f"override {dotted(key)}: {what}.", *more)
        line = self.lines.get(key)
        where = f"{self.name}: {dotted(key)}" if key else self.name
        return RecipeError(f"{where}: {what}{f' (line {line})' if line else ''}.", *more)


def dotted(key: Key) -> str:
    """A key's path in one word, safe to print.

    Example:
        >>> dotted(("method", 0, "rank"))
        'method.0.rank'
    """
    text = ".".join(str(part) for part in key)
    return text if text.isprintable() and len(text) < 200 else ascii(text)[1:-1][:100]


def read_document(source: Path | str) -> Document:
    """A recipe file, or the text of one (a str with a line break).

    Errors: RecipeError for a file that cannot be read and for text that is not such YAML.
    """
    if isinstance(source, str) and "\n" in source:
        return parse_text(source, "recipe")
    path = Path(source)
    try:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_BYTES else None
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{ascii(str(source))[:200]}: cannot be read: {error}.") from None
    if data is None:
        raise _too_large(str(path)) if exists and path.is_file() else _missing(path)
    try:
        return parse_text(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}: not UTF-8 text (line {line}).", "Save it as UTF-8.") from None


def parse_text(text: str, name: str) -> Document:
    """The text of a recipe. Errors: RecipeError.

    Example:
        >>> parse_text("method:\\n  rank: 4\\n", "recipe.yaml").tree
        {'method': {'rank': 4}}
    """
    if len(text) > MAX_BYTES:
        raise _too_large(name)
    node = compose(text, name)
    document = Document(name, {})
    if node is None:
        raise RecipeError(f"{name}: is empty.", "A recipe holds at least: model, method and data.")
    if not isinstance(node, MappingNode):
        raise RecipeError(f"{name}: holds {_kind(node)}, not keys with values.",
                          "A recipe reads for example: model: minilm")
    document.tree = _plain(node, (), document)
    return document


def parse_value(text: str, name: str, key: Key, document: Document) -> Any:
    """One value, as an override gives it: a scalar, [a list] or {a: mapping}."""
    if len(text) > MAX_BYTES:
        raise _too_large(name)
    node = compose(text, name)
    return None if node is None else _plain(node, key, document)


def compose(text: str, name: str) -> Node | None:
    """The nodes of a text. Errors: RecipeError with the line."""
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{name}: not valid YAML: {error.problem or error.context}{place}.", _advice(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = ascii(getattr(error, "reason", str(error)))[1:-1]
        raise RecipeError(f"{name}: not valid YAML: {reason[:200]}.") from None


class _Loader(yaml.BaseLoader):
    """Composes nodes of text only: nothing is constructed from tags, nothing refers to another node."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors (&) and aliases (*) are not taken", problem_mark=mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags (!) are not taken", problem_mark=mark)
        self.values += 1
        if self.values > MAX_VALUES or self.depth > MAX_DEPTH:
            what = f"more than {MAX_VALUES} values" if self.values > MAX_VALUES else f"deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=f"{what}, which no recipe needs", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _plain(node: Node, key: Key, document: Document) -> Any:
    if isinstance(node, ScalarNode):
        return _scalar(node, key, document)
    if isinstance(node, SequenceNode):
        return [_plain(_lined(item, (*key, i), document), (*key, i), document) for i, item in enumerate(node.value)]
    tree: dict[str, Any] = {}
    for name, value in node.value:
        if not isinstance(name, ScalarNode):
            raise document.error(key, f"a key is {_kind(name)}, not a word", _spaces(name))
        path = (*key, name.value)
        if name.value in tree:
            first = document.lines.get(path)
            document.lines[path] = name.start_mark.line + 1
            raise document.error(path, "stands twice", f"First in line {first}." if first else "", "Keep one of them.")
        document.lines[path] = name.start_mark.line + 1
        tree[name.value] = _plain(value, path, document)
    return tree


def _lined(node: Node, key: Key, document: Document) -> Node:
    document.lines[key] = node.start_mark.line + 1
    return node


def _scalar(node: ScalarNode, key: Key, document: Document) -> Any:
    text: str = node.value
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise document.error(key, f"{text[:24]}... is too large a number", "Whole numbers have at most 63 bits.")
        return int(text)
    if _FLOAT.fullmatch(text):
        value = math.inf if text[-1] in "fFnN" else float(text)
        if not math.isfinite(value):
            raise document.error(key, f"{text[:24]} is not a finite number")
        return value
    return text


def _kind(node: Node) -> str:
    return {MappingNode: "a mapping", SequenceNode: "a list"}.get(type(node), "a single value")


def _spaces(node: Node) -> str:
    return f"It begins in line {node.start_mark.line + 1}; are braces or a quote missing there?"


def _advice(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "\\t" in problem:
        return "Indent with spaces, not tabs."
    if "anchors" in problem:
        return "Write the value out where it is used; quote it if it is a text that begins with & or *."
    if "tags" in problem:
        return "A recipe is data only; quote a text that begins with '!'."
    return "Check the indentation, and quote texts that hold ': ' or ' #'."


def _too_large(name: str) -> RecipeError:
    return RecipeError(f"{name}: larger than {MAX_BYTES // 1024} kB, which no recipe is.")


def _missing(path: Path) -> RecipeError:
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))
        return RecipeError(f"{path}: is a folder, not a recipe.",
                           f"It has: {listing(inside, 12)}" if inside else "It has no .yaml file.")
    names = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return RecipeError(f"{path}: no such file.", f"{path.parent} has: {listing(names, 12)}" if names else
                       "Give the path of a .yaml file.", suggest(path.name, names))
