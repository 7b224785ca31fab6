"""The `privacy` key of a recipe, and what the card says of it."""
import pytest

from slimtune.errors import RecipeError
from slimtune.recipe import read_recipe
from slimtune.recipe.parse import render
from slimtune.recipe.promise import promise

TEXT = "model: minilm\nmethod: lora\ndata: {task: classification, train: a.csv}\n"
GIVEN = ["privacy.epsilon=8", "privacy.delta=1e-5"]


def test_two_overrides_make_a_recipe_private_and_it_reads_itself_back():
    recipe = read_recipe(TEXT, GIVEN)
    assert recipe.privacy is not None
    assert (recipe.privacy.epsilon, recipe.privacy.delta) == (8, 1e-5)
    assert recipe.train.clip is None
    assert read_recipe(render(recipe)).resolved() == recipe.resolved()
    assert read_recipe(TEXT).privacy is None
    assert read_recipe(TEXT).train.clip == 1.0


@pytest.mark.parametrize(("more", "told"), [
    (["privacy.epsilom=8"], "override privacy.epsilom: no such key for privacy"),
    (["privacy.epsilon=-1"], "privacy.epsilon: must be above 0"),
    (["privacy.delta=1"], "privacy.delta: must be below 1"),
    (["privacy.clipping=ghost"], "It takes: flat per_layer automatic adaptive"),
    (["train.gradient_accumulation=2"], "train: gradient_accumulation: is 2"),
    (["train.clip=0.5"], "train: clip: is of a batch's gradient"),
    (["train.cache=true"], "train: cache: private training does not use it"),
    (["data={task: causal_lm, train: a.txt}"], "set data.pack=false")])
def test_what_cannot_be_is_told_by_its_key(more, told):
    with pytest.raises(RecipeError) as caught:
        read_recipe(TEXT, [*GIVEN, *more])
    assert told in str(caught.value)


def test_privacy_alone_needs_delta():
    with pytest.raises(RecipeError, match=r"privacy.delta: is missing; privacy needs it"):
        read_recipe(TEXT, GIVEN[:1])


def test_the_card_says_when_nothing_is_promised():
    told = {"epsilon": 2.0, "delta": 1e-5, "examples": 1000, "neighbours": "one example more or less",
            "accountant": "prv", "noise_multiplier": 1.0, "clip": 1.0, "clipping": "flat", "steps": 10,
            "sample_rate": 0.1, "secure": False, "seed": "the operating system's", "opacus": "1.6.0"}
    text = "\n".join(promise(told))
    assert "(2.000, 1e-05)-differentially private" in text
    assert "Not covered: metrics.jsonl" in text
    assert "no guarantee" not in text
    assert "no guarantee towards whoever knows it" in "\n".join(promise(told | {"seed": "given"}))
    assert "could keep this promise" in "\n".join(promise(told | {"delta": 0.01}))
    assert promise(told | {"epsilon": None})[2] == "No noise was added: there is no guarantee."
