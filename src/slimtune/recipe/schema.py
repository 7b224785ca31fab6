"""schema: the JSON schema of a recipe, for editors; printed by `slimtune check --schema`."""
from typing import Any

from slimtune.methods import registered
from slimtune.recipe.tree import Recipe


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the whole tree; `method` is a union over every registered method, told by `name`.

    Example:
        >>> schema()["$defs"]["LoRA"]["properties"]["name"]
        {'const': 'lora', 'type': 'string'}
    """
    tree = Recipe.model_json_schema()
    shared: dict[str, Any] = tree.setdefault("$defs", {})
    shared.pop("Method", None)
    names: dict[str, str] = {}
    for name, cls in registered().items():
        own = cls.model_json_schema(ref_template="#/$defs/{model}")
        shared |= own.pop("$defs", {})
        own["properties"] = {"name": {"const": name, "type": "string"}, **own["properties"]}
        own["required"] = ["name", *own.get("required", ())]
        shared[cls.__name__] = own
        names[name] = f"#/$defs/{cls.__name__}"
    one = {"oneOf": [{"$ref": ref} for ref in names.values()],
           "discriminator": {"propertyName": "name", "mapping": names}}
    shared["OneMethod"] = {"anyOf": [one, {"enum": list(names), "type": "string"}]}
    about = tree["properties"]["method"].get("description", "")
    tree["properties"]["method"] = {"description": about, "anyOf": [
        {"$ref": "#/$defs/OneMethod"}, {"type": "array", "items": {"$ref": "#/$defs/OneMethod"}, "minItems": 1}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
