"""pydantic's complaints in the words of a recipe: the path of the key, what is wrong, what is taken."""
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slimtune.errors import MethodError, RecipeError, SlimtuneError, listing, suggest
from slimtune.methods import registered
from slimtune.recipe.document import Document, Key, dotted

_SAYINGS = {
    "int_type": "must be a whole number", "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number", "float_type": "must be a number", "float_parsing": "must be a number",
    "string_type": "must be text", "bool_type": "must be true or false", "bool_parsing": "must be true or false",
    "tuple_type": "must be a list, such as [a, b]", "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping of keys", "model_type": "must be a mapping of keys",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
    "too_short": "must hold at least {min_length}", "too_long": "must hold at most {max_length}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
}


def explain(error: ValidationError, document: Document, root: type[BaseModel]) -> RecipeError:
    """The first complaint as a RecipeError, unknown keys before others, and the paths of the rest."""
    told: dict[Key, Any] = {}
    items = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    for item in sorted(items, key=lambda e: e["type"] != "extra_forbidden"):
        told.setdefault(_at_name(path_of(item["loc"], document.tree, item["type"] == "missing"), item, document), item)
    (key, first), *others = told.items()
    also = [dotted(other) for other, _ in others if other[:len(key)] != key]
    what, *more = _say(key, first, document.tree, root)
    return document.error(key, what, *more, f"Also wrong: {listing(also, 8)}" if also else "")


def path_of(loc: Sequence[str | int], tree: Any, missing: bool = False) -> Key:
    """The part of a location that exists in the recipe; pydantic also names branches of unions.

    Example:
        >>> path_of(("method", 0, "rank", "int"), {"method": {"rank": "x"}})
        ('method', 'rank')
    """
    key: Key = ()
    for i, part in enumerate(loc):
        inside = (isinstance(tree, Mapping) and part in tree) or (
            isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree))
        if inside:
            tree = tree[part]  # type: ignore[index]
            key = (*key, part)
        elif isinstance(tree, BaseModel) and isinstance(part, str) and hasattr(tree, part):
            tree = getattr(tree, part)
            key = (*key, part)
        elif missing and i == len(loc) - 1:
            key = (*key, part)
    return key


def _at_name(key: Key, item: Any, document: Document) -> Key:
    """An unknown method is an error of its `name`, where it has one."""
    if not isinstance((item.get("ctx") or {}).get("error"), MethodError):
        return key
    node: Any = document.tree
    for part in key:
        node = node[part]
    return (*key, "name") if isinstance(node, Mapping) and "name" in node else key


def _say(key: Key, item: Any, tree: Any, root: type[BaseModel]) -> list[str]:
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        return _unknown(key, tree, root)
    if kind == "missing":
        owner, keys = owner_of(key[:-1], tree, root)
        return [f"is missing; {owner} needs it", f"It takes: {listing(keys)}"]
    got = _got(item.get("input"))
    if kind in ("literal_error", "enum"):
        options = re.findall(r"'([^']*)'", str(context.get("expected")))
        return [f"{got} is not one of its values", f"It takes: {listing(options)}",
                suggest(str(item.get("input")), options)]
    if kind == "value_error":
        return _raised(context.get("error"), item)
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        owner, keys = owner_of(key, tree, root)
        takes = f"It takes: {listing(keys)}" if keys else ""
        if key[:1] == ("method",):
            takes = f"For example {{name: lora, rank: 8}}. There are: {listing(registered())}"
        return [f"must be a mapping of keys (got {got})", takes]
    saying = _SAYINGS.get(kind) or item["msg"].replace("Input should be", "must be").replace("String should", "must")
    return [f"{saying.format(**context) if kind in _SAYINGS else saying} (got {got})"]


def _raised(error: Any, item: Any) -> list[str]:
    """What one of our own checks said."""
    if isinstance(error, SlimtuneError):
        return [error.what.rstrip("."), *error.more]
    return [str(error or item["msg"]).rstrip(".")]


def _unknown(key: Key, tree: Any, root: type[BaseModel]) -> list[str]:
    owner, keys = owner_of(key[:-1], tree, root)
    name = str(key[-1])
    homes = [home for home in ((), ("method",), ("data",), ("train",), ("privacy",))
             if home != key[:-1] and name in owner_of(home, tree, root)[1]]
    if homes:
        near = f"It is a key of {dotted(homes[0]) or 'the recipe itself'}: write it as {dotted((*homes[0], name))}."
    else:
        near = suggest(name, keys)
    return [f"no such key for {owner}", f"It takes: {listing(keys)}", near]


def owner_of(key: Key, tree: Any, root: type[BaseModel]) -> tuple[str, list[str]]:
    """Who takes the keys below a path: its name in a sentence, and the keys."""
    if key[:1] == ("method",):
        node: Any = tree
        for part in key:
            node = None if _lacks(node, part) else node[part]
        name = node.get("name") if isinstance(node, Mapping) else None
        cls = registered().get(name) if isinstance(name, str) else None
        return (cls.__name__, own_first(cls)) if cls else ("a method", ["name"])
    cls, node = root, tree
    for part in key:
        field = cls.model_fields.get(str(part))
        node = None if _lacks(node, part) else node[part]
        found = _meant(_models(field.annotation), node) if field else None
        if found is None:
            return dotted(key), []
        cls = found
    return (dotted(key) or "a recipe"), list(cls.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field takes, unions and annotations looked through."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inside = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    union = get_origin(annotation) in (Annotated, Union, UnionType)
    return [cls for part in inside for cls in _models(part)] if union else []


def _meant(models: Sequence[type[BaseModel]], node: Any) -> type[BaseModel] | None:
    """Of a union's models the one that a mapping names, or else has most keys of; the first of equals."""
    def fits(cls: type[BaseModel]) -> tuple[bool, int]:
        if not isinstance(node, Mapping):
            return False, 0
        told = cls.model_fields.get("name")
        return told is not None and told.default == node.get("name"), len(set(node) & set(cls.model_fields))
    return max(models, key=fits, default=None)


def _lacks(node: Any, part: str | int) -> bool:
    if isinstance(node, Mapping):
        return part not in node
    return not (isinstance(node, list | tuple) and isinstance(part, int) and part < len(node))


def own_first(cls: type[BaseModel]) -> list[str]:
    """Keys of a method, those of its own class before those that every method has."""
    names = [n for c in cls.__mro__ for n in vars(c).get("__annotations__", {}) if n in cls.model_fields]
    return list(dict.fromkeys([*names, *cls.model_fields]))


def _got(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
