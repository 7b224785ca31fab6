"""DataSpec: what is refused, and that its schema explains every field."""
import pytest
from pydantic import ValidationError

from slimtune.data import DataSpec


def test_every_field_is_described_in_the_schema():
    properties = DataSpec.model_json_schema()["properties"]
    assert set(properties) == set(DataSpec.model_fields)
    assert not [name for name, entry in properties.items() if len(entry.get("description", "")) < 15]


@pytest.mark.parametrize(("values", "message"), [
    ({}, "nothing to read"),
    ({"train": "a.csv", "trian": "b.csv"}, "Extra inputs are not permitted"),
    ({"train": "a.csv", "columns": ["text"]}, "columns is for files without a header"),
    ({"train": "a.csv", "header": False}, "a file without a header needs columns"),
    ({"train": "a.csv", "task": "seq2seq", "pair": "b"}, "pair is for classification and regression"),
    ({"train": "a.csv", "labels": ["a", "a"]}, "labels must be one or more different names"),
    ({"train": "a.csv", "labels": []}, "labels must be one or more different names"),
    ({"train": "a.csv", "validation_fraction": 0.9}, "less than or equal to 0.5"),
    ({"train": "a.csv", "max_length": 0}, "greater than or equal to 4"),
    ({"train": "a.csv", "limit": 0}, "greater than or equal to 1"),
    ({"train": "a.csv", "delimiter": "||"}, "at most 1 character"),
    ({"train": "a.csv", "task": "classify"}, "Input should be 'classification'"),
])
def test_refusals(values, message):
    with pytest.raises(ValidationError, match=message):
        DataSpec(**{"task": "classification", **values})


def test_labels_may_be_written_as_numbers():
    assert DataSpec(task="classification", train="a.csv", labels=[0, 1]).labels == ("0", "1")


def test_it_survives_json():
    spec = DataSpec(task="regression", train="a.csv", pair="b", limit=5)
    assert DataSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.limit = 6
