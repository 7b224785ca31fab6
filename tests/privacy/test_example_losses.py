"""Each task's loss: one an example, which is the model's own when the example is alone."""
import pytest
import torch
from privacy_toys import part, texts

from slimtune.errors import MethodError
from slimtune.privacy.losses import example_losses
from slimtune.testing import batch, tiny


def task(kind: str):
    import transformers

    if kind in ("bert", "gpt2", "t5", "vit", "llama"):
        return tiny(kind), batch(kind)
    like = tiny("bert").config
    if kind == "tags":
        model = transformers.BertForTokenClassification(like).eval()
        inputs = texts(3, classes=False)
        return model, inputs | {"labels": inputs["labels"].where(inputs["labels"] < 0, inputs["labels"] % 3)}
    like.num_labels = 1 if kind == "number" else 3
    model = transformers.BertForSequenceClassification(like).eval()
    inputs = texts(3)
    if kind == "number":
        return model, inputs | {"labels": torch.tensor([0.5, -1.0, 3.0])}
    model.config.problem_type = "multi_label_classification"
    return model, inputs | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit", "tags", "number", "labels"])
def test_it_is_the_models_own_loss_of_each_example_alone(kind):
    model, inputs = task(kind)
    found = example_losses(model, inputs)
    assert found.shape == inputs["labels"].shape[:1]
    for i, loss in enumerate(found):
        torch.testing.assert_close(loss, model(**part(inputs, slice(i, i + 1))).loss, rtol=1e-4, atol=1e-5)


def test_the_models_own_batch_loss_hangs_on_the_others():
    """Which is why it is not used: a mean over all tokens."""
    model, inputs = tiny("gpt2"), texts(3, classes=False)
    own = model(**inputs).loss
    assert not torch.isclose(own, example_losses(model, inputs).mean(), rtol=1e-3)


def test_an_example_without_scored_tokens_has_loss_0():
    model, inputs = task("tags")
    inputs["labels"][1] = -100
    found = example_losses(model, inputs)
    assert found[1] == 0
    assert bool(found.isfinite().all())


def test_models_that_compare_examples_are_refused():
    with pytest.raises(MethodError, match="gives no logits"):
        example_losses(tiny("clip"), batch("clip"))
