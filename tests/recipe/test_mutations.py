"""Recipes mutated by machine, from the schema: each is refused as bad input, by the path of its key, at once."""
import contextlib
import copy
import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slimtune.cli.main import app
from slimtune.errors import RecipeError
from slimtune.recipe import read_recipe, schema

SCHEMA = schema()
METHODS = next(b for b in SCHEMA["$defs"]["OneMethod"]["anyOf"] if "oneOf" in b)["discriminator"]["mapping"]
BASES: list[dict[str, Any]] = [
    {"name": "a", "model": "minilm", "method": {"name": "lora", "rank": 4, "sites": ["attn.q"], "blocks": [0, 1]},
     "data": {"task": "classification", "train": "a.csv", "labels": ["no", "yes"], "max_length": 32, "header": True},
     "train": {"epochs": 2, "learning_rate": 1e-3, "schedule": "cosine", "clip": 1.0}, "seed": 3, "output": "runs/a"},
    {"model": "minilm", "method": [{"name": "houlsby", "bottleneck": 8}, {"name": "prefix_tuning"}],
     "data": {"task": "regression", "test": "b.tsv", "pair": "other", "limit": 10},
     "train": {"steps": 2, "warmup": 0.1}},
    {"model": "m/n", "method": {"name": "ia3"}, "data": {"task": "causal_lm", "train": "c.txt", "pack": False}},
]
JUNK = ["\t", "&a ", "*a", "!!python/name:os.system ", "- ", "{", "]", "'", '"', ": ", "#", "|", ">", "---\n", "\x00",
        "\ud800", "%YAML 9\n", "<<: ", "? ", "\ufeff", "9" * 400, "[" * 50]
NUMBERS = [".nan", ".inf", "-.inf", "1e999", "9" * 40, "-" + "9" * 5000]


def nodes(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of every value of a tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, child in children for p in nodes(child, (*path, key)))]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def schema_of(tree: Any, path: tuple) -> dict[str, Any]:
    """The part of the schema that describes a value."""
    part: dict[str, Any] = SCHEMA
    for i, key in enumerate(path):
        if path[:i] == ("method",) and isinstance(key, int):
            continue
        if isinstance(key, int):
            part = next(p for p in (part, *part.get("anyOf", ())) if "items" in p)["items"]
            continue
        if key not in part.get("properties", {}):  # below a method: the branch of its name
            name = at(tree, path[:i])["name"]
            part = SCHEMA["$defs"][METHODS[name].rpartition("/")[2]]
        part = part["properties"][key]
        if "$ref" in part:
            part = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]
    return part


def taken(part: dict[str, Any]) -> set[str]:
    """The kinds of value that a part of the schema takes."""
    kinds = {part["type"]} if "type" in part else set()
    if "const" in part or "enum" in part:
        kinds.add("word")
    for branch in part.get("anyOf", ()):
        kinds |= taken(SCHEMA["$defs"][branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch)
    return kinds | ({"integer"} if "number" in kinds else set())


WRONG = {
    "string": ["x", "", "\u202e", "1", "true"], "integer": [3, -7, 0], "number": [0.5, -2.5], "boolean": [True, False],
    "array": [[], [[1]], ["x"], [None]], "object": [{}, {"x": 1}, {"": {}}], "null": [None],
}


@st.composite
def mutants(draw) -> tuple[dict[str, Any], tuple, str]:
    """(tree, path of the key at fault, what was done)."""
    tree = copy.deepcopy(draw(st.sampled_from(BASES)))
    kind = draw(st.sampled_from(["unknown", "type", "range", "enum", "missing", "moved", "number"]))
    paths = nodes(tree)
    if kind == "unknown":
        home = draw(st.sampled_from([p for p in paths if isinstance(at(tree, p), dict)]))
        known = set(schema_of(tree, (*home, next(iter(at(tree, home)))) if home else ()).get("properties", {}))
        word = draw(st.one_of(st.text(max_size=20), st.sampled_from(sorted(nodes_names())).map(lambda n: n[:-1] + "_")))
        home_keys = keys_of(tree, home)
        if word in home_keys | known:
            word += "_"
        at(tree, home)[word] = draw(st.sampled_from([1, "x", None, [], {"a": 1}]))
        return tree, (*home, word), kind
    if kind == "type":
        path = draw(st.sampled_from([p for p in paths if p and p[-1] != "name" and p != ("method",)
                                     and not (p[:1] == ("method",) and isinstance(p[-1], int) and len(p) == 2)
                                     and p[:2] != ("data", "labels")]))
        allowed = taken(schema_of(tree, path))
        wrong = draw(st.sampled_from(sorted(set(WRONG) - allowed - ({"string"} if "word" in allowed else set()))))
        value = draw(st.sampled_from(WRONG[wrong]))
        at(tree, path[:-1])[path[-1]] = value
        return tree, path, kind
    if kind == "range":
        low = [("seed",), ("data", "max_length"), ("data", "limit"), ("train", "batch_size"), ("train", "epochs"),
               ("train", "steps"), ("train", "learning_rate"), ("train", "log_every"), ("data", "seed")]
        path = draw(st.sampled_from(low))
        tree.setdefault(path[0], {}) if len(path) > 1 else None
        at(tree, path[:-1])[path[-1]] = draw(st.integers(-(2**62), -1))
        return tree, path, kind
    if kind == "enum":
        path = draw(st.sampled_from([
            ("data", "task"), ("data", "source"), ("train", "schedule"), ("train", "optimizer"), ("train", "precision"),
            ("method", "name"), ("method", "head"), ("method", "norms")]))
        if path[0] == "method" and isinstance(tree["method"], list):
            path = ("method", 0, path[1])
        tree.setdefault(path[0], {})
        at(tree, path[:-1])[path[-1]] = draw(st.text(max_size=30)) + "?"
        return tree, path, kind
    if kind == "missing":
        path = draw(st.sampled_from([("model",), ("method",), ("data",), ("data", "task")]))
        del at(tree, path[:-1])[path[-1]]
        return tree, path, kind
    if kind == "moved":  # a node one level too deep, or too high
        name = draw(st.sampled_from(["data", "train"]))
        inner = draw(st.sampled_from(["max_length", "batch_size"]))
        if (name == "data") == (inner == "max_length"):
            tree[inner] = 32
            return tree, (inner,), kind
        tree.setdefault(name, {})[inner] = 32
        return tree, (name, inner), kind
    path = draw(st.sampled_from([("seed",), ("train", "learning_rate"), ("data", "max_length")]))
    tree.setdefault(path[0], {}) if len(path) > 1 else None
    at(tree, path[:-1])[path[-1]] = "@" + draw(st.sampled_from(NUMBERS))
    return tree, path, kind


def text_of(tree: Any) -> str:
    """YAML; a text that begins with @ is digits, to be written without quotes."""
    return re.sub("'@(.*?)'", r"\1", yaml.safe_dump(tree, allow_unicode=True, width=100_000))


def nodes_names() -> set[str]:
    return {str(key) for base in BASES for path in nodes(base) for key in path if isinstance(key, str)}


def keys_of(tree: Any, home: tuple) -> set[str]:
    """The keys that a mapping takes."""
    if home[:1] == ("method",):
        return set(SCHEMA["$defs"][METHODS[at(tree, home)["name"]].rpartition("/")[2]]["properties"])
    return set(schema_of(tree, home).get("properties", {}))


def shown(path: tuple) -> str:
    text = ".".join(map(str, path))
    return text if text.isprintable() else ascii(text)[1:-1]


def test_every_mutated_recipe_is_exit_2_with_the_path_of_its_key(tmp_path):
    """At least 300, in less than a minute; 450 take some seconds."""
    file, told = tmp_path / "mutant.yaml", set()

    @settings(max_examples=450, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(mutants())
    def refuse(mutant):
        tree, path, kind = mutant
        file.write_text(text_of(tree), encoding="utf-8")
        result = CliRunner().invoke(app, [("check", "tune")[len(told) % 2], str(file)])
        where = (kind, path, result.output)
        assert result.exit_code == 2, where
        assert "Traceback" not in result.output, where
        assert result.stdout == "", where
        assert result.stderr.startswith("RecipeError: "), where
        assert shown(path) in result.stderr.splitlines()[0], where
        told.add(file.read_text(encoding="utf-8"))

    start = time.perf_counter()
    refuse()
    print(f"{len(told)} different recipes refused in {time.perf_counter() - start:.1f} s")
    assert len(told) >= 300
    assert time.perf_counter() - start < 60


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_text_is_read_or_refused_but_never_fails(data):
    text = yaml.safe_dump(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 4))):
        cut = data.draw(st.integers(0, len(text)))
        junk = data.draw(st.sampled_from(JUNK) | st.text(max_size=8))
        text = text[:cut] + junk + text[cut + data.draw(st.integers(0, 6)):]
    with contextlib.suppress(RecipeError):
        read_recipe(text + "\n")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_is_taken_or_refused_but_never_fails(name, value):
    with contextlib.suppress(RecipeError):
        read_recipe("model: m\nmethod: [lora]\ndata: {task: causal_lm, train: x}\n", [f"{name}={value}"])


@pytest.mark.parametrize("base", BASES)
def test_the_unmutated_recipes_are_valid(base):
    read_recipe(yaml.safe_dump(base))
