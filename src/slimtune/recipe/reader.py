"""reader: what turns a recipe's data into the model's input: its tokenizer, or the transform of its images."""
from typing import Any

from slimtune.data.spec import IMAGES, DataSpec
from slimtune.data.transform import transform_of
from slimtune.io.images import load_image_input
from slimtune.io.models import load_tokenizer


def reader(model: str, spec: DataSpec) -> Any:
    """Errors: SlimtuneError for a model that does not read what the task has, DataError for a size it cannot read."""
    if spec.task in IMAGES:
        return transform_of(spec, load_image_input(model))
    return load_tokenizer(model, words=spec.task == "token_classification")


def by_length(spec: DataSpec) -> bool:
    """Whether examples have lengths, by which batches pad less."""
    return spec.task not in IMAGES
