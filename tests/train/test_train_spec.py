"""TrainSpec: what it takes and refuses, and that each field says what it is."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

from slimtune.errors import RecipeError
from slimtune.train import TrainSpec
from slimtune.train.spec import more_is_better


def test_every_field_is_described():
    schema = TrainSpec.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(len(field["description"]) > 15 for field in schema["properties"].values())


def test_it_survives_json():
    spec = TrainSpec(steps=5, best="macro_f1", patience=2, save_every=3)
    assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("values", [
    {"epoch": 3}, {"epochs": 0}, {"epochs": float("inf")}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0},
    {"learning_rate": float("nan")}, {"warmup": 1.0}, {"warmup": -0.1}, {"schedule": "poly"}, {"clip": 0},
    {"precision": "float16"}, {"keep": 0}, {"patience": 2}, {"best_mode": "max"}, {"seed": -1}, {"threads": 0},
    {"seed": 2**32}, {"optimizer": "sgd"}])
def test_it_refuses(values):
    with pytest.raises(ValidationError):
        TrainSpec(**values)


def test_it_is_frozen():
    with pytest.raises(ValidationError):
        TrainSpec().epochs = 2


@given(some.dictionaries(some.sampled_from([*TrainSpec.model_fields, "nosuch"]),
                         some.none() | some.integers(-3, 3) | some.floats() | some.text(max_size=3), max_size=4))
@settings(max_examples=200, deadline=None)
def test_whatever_it_takes_it_gives_back(values):
    try:
        spec = TrainSpec(**values)
    except ValidationError:
        pass
    else:
        assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec


def test_which_way_is_better():
    assert more_is_better(TrainSpec(best="macro_f1"))
    assert more_is_better(TrainSpec(best="eval_accuracy"))
    assert not more_is_better(TrainSpec(best="loss"))
    assert not more_is_better(TrainSpec(best="perplexity"))
    assert not more_is_better(TrainSpec(best="own", best_mode="min"))
    with pytest.raises(RecipeError, match=r"train\.best: is more or less of 'own' better"):
        more_is_better(TrainSpec(best="own"))
