"""read_recipe: from YAML and overrides to a Recipe; render: back to YAML."""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import to_json

from slimtune.recipe.document import read_document
from slimtune.recipe.explain import explain
from slimtune.recipe.override import apply_overrides
from slimtune.recipe.tree import NAME, Recipe


def read_recipe(source: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a file (or of a text with line breaks), with dotted overrides applied in order.

    Values are taken as they are typed: the text "8" is no number, and 8 is no text.
    Errors: RecipeError with the path of the key, its line, what is taken, and the nearest name.

    Example:
        >>> text = "model: minilm\\nmethod: {name: lora}\\ndata: {task: causal_lm, train: a.txt}\\n"
        >>> read_recipe(text, ["method.rank=4", "seed=3"]).method[0].rank
        4
    """
    document = read_document(source)
    apply_overrides(document, overrides)
    if "name" not in document.tree and document.name != "recipe" and NAME.fullmatch(Path(document.name).stem):
        document.tree["name"] = Path(document.name).stem
    blank = Recipe.__new__(Recipe)
    try:
        Recipe.__pydantic_validator__.validate_json(to_json(document.tree), strict=True, self_instance=blank)
    except ValidationError as error:
        raise explain(error, document, Recipe) from None
    return blank


def render(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, with its value or default."""
    return yaml.dump(recipe.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Texts that YAML 1.1 or 1.2 could take for something else are quoted; short lists stay on a line."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = value.replace("_", "").replace("/", "").replace(".", "").isalpha() and value.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    flat = all(not isinstance(item, dict | list) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_WORDS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null", "inf", "nan"}
_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
