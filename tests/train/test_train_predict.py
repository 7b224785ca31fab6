"""predict and evaluate against a plain loop, for every kind of head."""
import pytest
import torch
from train_toys import accuracy, attached, collate, rows

import slimtune as st
from slimtune.data import metrics
from slimtune.errors import DataError, TrainError
from slimtune.testing import tiny
from slimtune.train import evaluate, generated, predict, token_losses
from slimtune.train.predict import items


def one_by_one(model, data):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**collate([row])).logits for row in data])


def test_predictions_are_those_of_a_plain_loop():
    model, data = attached().model, rows()
    found = predict(model, data, collate, 5)
    torch.testing.assert_close(found.predictions, one_by_one(model, data))
    assert found.references.tolist() == [row["labels"] for row in data]
    loss = torch.nn.functional.cross_entropy(found.predictions, found.references)
    assert found.loss == pytest.approx(float(loss), abs=1e-6)


def test_it_is_deterministic_and_touches_nothing():
    model = attached().model
    model.train()
    model.bert.eval()
    torch.manual_seed(3)
    first = predict(model, rows(), collate, 5)
    assert torch.equal(torch.rand(1), torch.manual_seed(3) and torch.rand(1))
    torch.manual_seed(9)
    assert torch.equal(first.predictions, predict(model, rows(), collate, 5).predictions)
    assert model.training
    assert not model.bert.training
    assert not first.predictions.requires_grad


def test_by_length_keeps_the_order_of_the_data():
    model, data = attached().model, rows()
    found = predict(model, data, collate, 5, by_length=True)
    assert found.references.tolist() == [row["labels"] for row in data]
    torch.testing.assert_close(found.predictions, one_by_one(model, data))
    assert found.loss == pytest.approx(predict(model, data, collate, 5).loss, abs=1e-6)


def test_without_labels_there_is_no_loss():
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    found = predict(attached().model, data, collate, 5)
    assert found.references is None
    assert found.loss is None
    assert found.predictions.shape == (22, 3)
    with pytest.raises(DataError, match="no examples"):
        predict(attached().model, [], collate)


def test_evaluate_adds_the_loss():
    model, data = attached().model, rows()
    found = predict(model, data, collate, 5)
    assert evaluate(model, data, collate, accuracy, 5) == {"loss": found.loss,
                                                         **accuracy(found.predictions, found.references)}
    assert set(evaluate(model, data, collate, metrics("classification"), 5)) == {"loss", "accuracy", "macro_f1"}
    assert set(evaluate(model, data, collate, None, 5)) == {"loss"}
    with pytest.raises(TrainError, match="a metric is named 'loss'"):
        evaluate(model, data, collate, lambda p, r: {"loss": 0.0}, 5)


def tagged(batch):
    """Labels of tokens, -100 where the id is even and on padding."""
    made = collate([{k: v for k, v in row.items() if k != "labels"} for row in batch])
    ids = made["input_ids"]
    return {**made, "labels": torch.where((ids % 2 == 1) & (made["attention_mask"] == 1), ids % 3, -100)}


def test_tagging_pads_to_the_longest_and_weighs_tokens():
    from transformers import BertForTokenClassification

    base = tiny("bert")
    torch.manual_seed(0)
    model = BertForTokenClassification(base.config)
    data = rows()
    found = predict(model, data, tagged, 4)
    longest = max(len(row["input_ids"]) for row in data)
    assert found.predictions.shape == (22, longest, 3)
    assert found.references.shape == (22, longest)
    scored = found.references != -100
    loss = torch.nn.functional.cross_entropy(found.predictions[scored], found.references[scored])
    assert found.loss == pytest.approx(float(loss), abs=1e-6)
    assert predict(model, data, tagged, 3, by_length=True).loss == pytest.approx(float(loss), abs=1e-6)


def text(batch):
    made = collate([{k: v for k, v in row.items() if k != "labels"} for row in batch])
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_causal_language_models_are_scored_by_token(name):
    model, data = tiny(name), rows()
    found = predict(model, data, text, 4, step=token_losses)
    assert found.predictions.shape == found.references.shape == (22,)
    assert int(found.references.sum()) == sum(len(row["input_ids"]) - 1 for row in data)
    mean = float(found.predictions.sum() / found.references.sum())
    assert found.loss == pytest.approx(mean, abs=1e-5)
    scores = evaluate(model, data, text, metrics("causal_lm"), 4, step=token_losses)
    assert scores["token_loss"] == pytest.approx(scores["loss"], abs=1e-5)
    with pytest.raises(DataError, match="needs labels"):
        predict(model, [{"input_ids": [5, 6]}], collate, step=token_losses)


class Words:
    """A tokenizer whose words are numbers."""

    pad_token_id = 0

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(int(i)) for i in row if i > 2) for row in ids]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_models_write(name):
    def pairs(batch):
        made = collate([{k: v for k, v in row.items() if k != "labels"} for row in batch])
        return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    model, data = tiny(name), rows(6)
    found = predict(model, data, pairs, 4, step=generated(Words(), max_new_tokens=5))
    assert found.references == [" ".join(str(i) for i in row["input_ids"]) for row in data]
    assert len(found.predictions) == 6
    assert all(isinstance(text, str) and len(text.split()) <= 6 for text in found.predictions)
    assert found.loss == pytest.approx(predict(model, data, pairs, 2).loss, abs=1e-5)


def test_regression_counts_every_number():
    model = tiny("bert", num_labels=1, problem_type="regression")
    data = [{**row, "labels": float(row["labels"]) - 100.0} for row in rows()]     # -100.0 is a number here
    found = predict(model, data, collate, 4)
    assert found.predictions.shape == (22, 1)
    mean = float(((found.predictions[:, 0] - found.references) ** 2).mean())
    assert found.loss == pytest.approx(mean, rel=1e-5)


def test_items():
    labels = torch.tensor([[1, 2, -100], [-100, 4, 5]])
    assert items(tiny("bert"), {"labels": labels}) == 4
    assert items(tiny("llama"), {"labels": labels}) == 3
    assert items(tiny("gpt2"), {"labels": labels}) == 3
    assert items(tiny("t5"), {"labels": labels}) == 4
    assert items(tiny("bert"), {"labels": torch.tensor([-100.0, 1.0])}) == 2
    assert items(tiny("bert"), {"input_ids": labels}) == 2


def test_bfloat16_gives_float32_logits():
    found = predict(attached().model, rows(), collate, 8, precision="bfloat16")
    assert found.predictions.dtype == torch.float32
    torch.testing.assert_close(found.predictions, predict(attached().model, rows(), collate, 8).predictions,
                               atol=0.05, rtol=0.1)
    assert not torch.equal(found.predictions, predict(attached().model, rows(), collate, 8).predictions)


def test_a_delta_changes_predictions_and_disabling_gives_them_back():
    model = tiny("bert")
    before = predict(model, rows(), collate).predictions
    delta = st.attach(model, st.methods.LoRA(rank=2))
    assert torch.equal(predict(model, rows(), collate).predictions, before)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.1)
    assert not torch.allclose(predict(model, rows(), collate).predictions, before)
    with delta.disabled():
        assert torch.equal(predict(model, rows(), collate).predictions, before)
