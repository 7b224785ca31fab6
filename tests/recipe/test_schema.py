"""The JSON schema: every key of every node, each method by its name, and what the shipped recipes say."""
import json
from pathlib import Path

import pytest
import yaml

from slimtune.data import DataSpec
from slimtune.methods import registered
from slimtune.recipe import Recipe, read_recipe, schema
from slimtune.train.spec import TrainSpec

SCHEMA = schema()
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_the_schema_is_json_and_names_every_key():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert set(SCHEMA["properties"]) == set(Recipe.model_fields)
    for node, cls in (("DataSpec", DataSpec), ("TrainSpec", TrainSpec)):
        assert set(SCHEMA["$defs"][node]["properties"]) == set(cls.model_fields)
        assert SCHEMA["$defs"][node]["additionalProperties"] is False
        assert all(part.get("description") for part in SCHEMA["$defs"][node]["properties"].values())


def test_methods_are_a_union_told_by_name():
    union = next(b for b in SCHEMA["$defs"]["OneMethod"]["anyOf"] if "oneOf" in b)
    assert union["discriminator"]["propertyName"] == "name"
    assert set(union["discriminator"]["mapping"]) == set(registered())
    for name, ref in union["discriminator"]["mapping"].items():
        method = SCHEMA["$defs"][ref.rpartition("/")[2]]
        assert method["properties"]["name"] == {"const": name, "type": "string"}
        assert "name" in method["required"]
        assert method["additionalProperties"] is False
        assert set(method["properties"]) == {"name", *registered()[name].model_fields}


def test_every_reference_is_there():
    text = json.dumps(SCHEMA)
    refs = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert refs <= set(SCHEMA["$defs"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_keep_the_schema(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(yaml.safe_load(path.read_text()) | {"train": recipe.resolved()["train"]}, SCHEMA)
    jsonschema.validate(recipe.resolved(), SCHEMA)
