"""Reading recipes: what they mean, what is refused, and the words it is refused in."""
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.data import DataSpec
from slimtune.errors import RecipeError, SlimtuneError
from slimtune.methods import Houlsby, LoRA, get, names
from slimtune.recipe import Recipe, read_recipe
from slimtune.recipe.document import MAX_BYTES, parse_text
from slimtune.recipe.parse import render
from slimtune.train.spec import TrainSpec

BASE = """\
model: minilm
method:
  name: lora
  rank: 4
data:
  task: classification
  dataset: drugreview
train:
  learning_rate: 1e-3
"""


def refused(text, *overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, overrides)
    return str(caught.value)


def test_the_tree_is_what_the_text_says():
    recipe = read_recipe(BASE, ["train.steps=7", "data.labels=[no, yes]", "seed=3"])
    assert recipe.method == (LoRA(rank=4),)
    assert recipe.data == DataSpec(task="classification", dataset="drugreview", labels=("no", "yes"))
    assert recipe.train == TrainSpec(learning_rate=1e-3, steps=7, seed=3)
    assert (recipe.seed, recipe.name, recipe.output) == (3, "run", "runs/run")


def test_python_and_yaml_give_the_same_recipe():
    assert read_recipe(BASE) == Recipe(model="minilm", method=LoRA(rank=4), train={"learning_rate": 1e-3},
                                       data=DataSpec(task="classification", dataset="drugreview"))


def test_a_file_names_its_run(tmp_path):
    path = tmp_path / "reviews.v2.yaml"
    path.write_text(BASE)
    recipe = read_recipe(path)
    assert (recipe.name, recipe.output, recipe.delta_name) == ("reviews.v2", "runs/reviews.v2", "reviews_v2")
    assert read_recipe(path, ["name=b"]).output == "runs/b"
    assert read_recipe(str(path)) == recipe


def test_a_list_is_a_union_and_a_word_is_a_method_with_its_defaults():
    assert read_recipe(BASE, ["method=[lora, {name: houlsby, bottleneck: 8}]"]).method == (
        LoRA(), Houlsby(bottleneck=8))
    assert read_recipe(BASE, ["method=lora", "method.rank=2"]).method == (LoRA(rank=2),)
    assert read_recipe(BASE, ["method=[lora, houlsby]", "method.1.bottleneck=8", "method.0.rank=2"]).method == (
        LoRA(rank=2), Houlsby(bottleneck=8))


def test_seeds_of_the_run_and_of_the_split_stay_apart():
    recipe = read_recipe(BASE, ["seed=5"])
    assert (recipe.train.seed, recipe.data.seed) == (5, 0)
    assert read_recipe(BASE, ["seed=5", "train.seed=1"]).train.seed == 1


@pytest.mark.parametrize("name", names())
def test_the_resolved_text_reads_back_as_the_same_recipe(name):
    recipe = Recipe(name="a", model="0123", method=[get(name)(), LoRA(rank=2)], train={"learning_rate": 1e-5},
                    data={"task": "classification", "train": "no", "label": "1e3",
                          "labels": ["yes", "null", "1", "a: b", "é"]})
    assert read_recipe(render(recipe)) == recipe


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1).filter(lambda s: s.isprintable()))
def test_any_printable_text_survives(text):
    recipe = Recipe(model=text, method="lora", data={"task": "causal_lm", "train": text})
    assert read_recipe(render(recipe)) == recipe


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("5", 5), ("-.5", -0.5), ("010", 10), ("no", "no"), ("on", "on"), ("true", True), ("~", None),
    ("", None),
    ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'5'", "5"), ("1_000", "1_000"), ("0x10", "0x10"), ("<<", "<<"),
    ("[a, 1]", ["a", 1]), ("{a: {b: [x]}}", {"a": {"b": ["x"]}}), ("1.0E5", 1e5), ("nan", "nan"), ("=", "=")])
def test_scalars_follow_yaml_1_2(text, value):
    read = parse_text(f"key: {text}\n", "x").tree["key"]
    assert read == value
    assert type(read) is type(value)


ERRORS = [
    ("method.ranks=8", "override method.ranks: no such key for LoRA.", "Did you mean 'rank'?", "It takes: rank alpha"),
    ("method.rank=four", "override method.rank: must be a whole number (got 'four')."),
    ("method.rank='4'", "method.rank: must be a whole number (got '4')."),
    ("method.rank=4.5", "method.rank: must be a whole number"),
    ("method.rank=true", "method.rank: must be a whole number (got true)."),
    ("method.rank=0", "method.rank: must be at least 1 (got 0)."),
    ("method.dropout=1", "method.dropout: must be below 1"),
    ("method.alpha=.nan", "method.alpha: .nan is not a finite number."),
    ("method.alpha=1e999", "method.alpha: 1e999 is not a finite number."),
    ("method.rank=99999999999999999999999", "method.rank: 99999999999999999999999... is too large a number."),
    ("method.name=lorra", "method.name: no method is named 'lorra'.", "Did you mean 'lora'?"),
    ("method.name=null", "method.name: a method needs a name.", "There are:"),
    ("method=[lora, {name: houlsby, bottlneck: 3}]", "method.1.bottlneck: no such key for Houlsby.", "'bottleneck'"),
    ("method=[]", "method: must hold at least 1"),
    ("method=7", "method: must be a mapping of keys (got 7).", "{name: lora, rank: 8}"),
    ("method.head=trian", "method.head: 'trian' is not one of its values.", "It takes: train freeze none", "'train'"),
    ("method.sites=attn.q", "method.sites: must be a list, such as [a, b] (got 'attn.q')."),
    ("method.sites=[[attn.q]]", "method.sites.0: must be text"),
    ("data.task=clasification", "data.task: 'clasification' is not one of its values.", "mean 'classification'?"),
    ("data.dataset=null", "data: give train, test, dataset or layout: there is nothing to read (line 5)."),
    ("data.max_length=2", "data.max_length: must be at least 4 (got 2)."),
    ("data.pack=yes", "data.pack: must be true or false (got 'yes')."),
    ("data={train: x.csv}", "data.task: is missing; data needs it."),
    ("train=fast", "train: must be a mapping of keys (got 'fast').", "It takes: epochs"),
    ("train.schedule=linaer", "train.schedule: 'linaer' is not one of its values.", "Did you mean 'linear'?"),
    ("train.patience=3", "train: patience counts evaluations"),
    ("learning_rate=1", "learning_rate: no such key for a recipe.", "write it as train.learning_rate."),
    ("data.rank=1", "data.rank: no such key for data.", "It is a key of method: write it as method.rank."),
    ("trian.steps=1", "trian: no such key for a recipe.", "Did you mean 'train'?"),
    ("seed=-1", "seed: must be at least 0"),
    ("name=../x", "name: a name has letters"),
    ("model=null", "model: must be text (got nothing)."),
    ("nonsense", "override 'nonsense': not of the form a.b=value."),
    (".=1", "override '.=1': not of the form"),
    ("method.rank.x=1", "override method.rank.x: method.rank is 4, which has no keys."),
    ("method.rank=[1", "override method.rank: not valid YAML"),
    ("method.rank=*x", "anchors (&) and aliases (*) are not taken"),
    ("method.rank=!!int 3", "tags (!) are not taken"),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda c: c[0])
def test_errors_name_the_key_and_what_is_taken(case):
    override, *parts = case
    message = refused(BASE, override)
    assert all(part in message for part in parts), message


def test_the_line_is_told_and_other_faults_are_listed():
    text = BASE.replace("rank: 4", "ranks: 4").replace("learning_rate: 1e-3", "learning_rate: quick")
    assert refused(text).splitlines() == [
        "recipe: method.ranks: no such key for LoRA (line 4).",
        "  It takes: rank alpha dropout rslora sites head norms pooler blocks", "  Did you mean 'rank'?",
        "  Also wrong: train.learning_rate"]


def test_the_message_of_the_examples(tmp_path, monkeypatch):
    """As ../shared/examples/errors.txt shows it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(BASE.replace("rank: 4", "ranks: 4"))
    first, takes, near = refused("recipe.yaml").splitlines()
    assert first == "recipe.yaml: method.ranks: no such key for LoRA (line 4)."
    assert takes.startswith("  It takes: rank alpha dropout")
    assert near == "  Did you mean 'rank'?"


TEXTS = {
    "empty": "\n", "comment": "# nothing\n", "list": "- a\n", "word": "minilm\n", "number": "3\n", "null": "null\n",
    "twice": BASE + "model: x\n", "tab": "model:\n\tname: 1\n", "tag": "model: !!python/object/apply:os.system [id]\n",
    "tag2": "model: !x y\n", "anchor": "model: &a x\nmethod: *a\n", "alias": "model: *a\n",
    "unclosed": "model: [a, b\n",
    "quote": 'model: "a\n', "two": "model: a\n---\nmodel: b\n", "keys": "? [a, b]\n: c\n", "nul": "model: \x00\n",
    "surrogate": "model: \ud800\n", "deep": "model: " + "[" * 60000 + "\n", "deeper": "model: " + "{a: " * 15000 + "\n",
    "indent": "".join(" " * i + "a:\n" for i in range(300)), "wide": "model: [" + "1," * 30000 + "]\n",
    "large": "model: " + "x" * MAX_BYTES + "\n", "digits": "seed: " + "9" * 60000 + "\n", "merge": "<<: {model: x}\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n"
                                                    for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "rtl": BASE + "\u202eknar: 4\n", "homoglyph": BASE.replace("rank", "r\u0430nk"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_too_strange_or_takes_long(name):
    start = time.perf_counter()
    message = refused(TEXTS[name])
    assert time.perf_counter() - start < 1.0
    assert len(message) < 2000
    assert message.splitlines()[0].endswith(".")
    assert message.replace("\n", "").isprintable()


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: a\nname: caf\xe9\n")
    (tmp_path / "big.yaml").write_text("#" * (MAX_BYTES + 1))
    assert "not UTF-8 text (line 2)" in refused(tmp_path / "latin.yaml")
    assert "larger than 64 kB" in refused(tmp_path / "big.yaml")
    assert "is a folder" in refused(tmp_path)
    message = refused(tmp_path / "latn.yaml")
    assert "no such file" in message
    assert "Did you mean 'latin.yaml'?" in message
    assert "no such file" in refused("\x00")
    assert "x" in refused("x" * 5000)


def test_python_callers_get_the_same_errors():
    with pytest.raises(RecipeError, match=r"recipe: method.ranks: no such key for LoRA"):
        Recipe(model="m", method={"name": "lora", "ranks": 3}, data={"task": "causal_lm", "train": "x"})
    with pytest.raises(RecipeError, match=r"recipe: data.task: 'x' is not one of"):
        Recipe(model="m", method=LoRA(), data={"task": "x", "train": "x"})
    with pytest.raises(SlimtuneError):
        Recipe(model="m", method=object(), data={"task": "causal_lm", "train": "x"})


def test_a_method_of_a_third_party_works_in_recipes():
    from slimtune.core import method as registry
    from slimtune.methods import register

    class ThirdPartyLoRA(LoRA):
        """Theirs."""

        warmth: float = 1.0

    register(ThirdPartyLoRA)
    try:
        recipe = read_recipe(BASE, ["method={name: third_party_lo_ra, warmth: 2}"])
        assert recipe.method[0] == ThirdPartyLoRA(warmth=2.0)
        assert read_recipe(render(recipe)) == recipe
        assert "Did you mean 'warmth'?" in refused(BASE, "method={name: third_party_lo_ra, warmt: 2}")
    finally:
        del registry._REGISTRY["third_party_lo_ra"]
