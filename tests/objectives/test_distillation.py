"""Distillation against its equation, with the scale of its gradient, and over real tokens only."""
import pytest
import torch
from torch import nn

from slimtune.errors import MethodError
from slimtune.objectives.distillation import Distillation, Teacher, divergence
from slimtune.testing.tiny import batch, tiny


def test_the_equation():
    s, t = torch.randn(5, 3, dtype=torch.float64).float(), torch.randn(5, 3)
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    torch.testing.assert_close(divergence(s, t, 3.0), 9 * (p * (p.log() - q.log())).sum(-1).mean())
    assert float(divergence(s, s, 3.0)) == 0


def test_the_gradient_keeps_its_size_over_temperatures():
    s, t = 0.01 * torch.randn(6, 4), 0.01 * torch.randn(6, 4)
    norms = []
    for tau in (1.0, 2.0, 8.0):
        x = s.clone().requires_grad_(True)
        divergence(x, t, tau).backward()
        norms.append(float(x.grad.norm()))
    assert max(norms) / min(norms) < 1.02


def test_a_teacher_weighs_both_losses():
    model, teacher = tiny("bert"), tiny("bert", seed=1)
    inputs = batch("bert")
    out = model(**inputs)
    found = Teacher(teacher, Distillation(teacher="x", weight=0.25, temperature=2))(inputs, out, out.loss)
    with torch.no_grad():
        known = teacher(**inputs).logits
    torch.testing.assert_close(found, 0.75 * out.loss + 0.25 * divergence(out.logits, known, 2.0))
    assert all(not p.requires_grad for p in teacher.parameters())


def test_padding_teaches_nothing():
    model, teacher, inputs = tiny("gpt2"), tiny("gpt2", seed=1), batch("gpt2")
    learn = Teacher(teacher, Distillation(teacher="x", weight=1.0))

    def of(ids):
        given = {**inputs, "input_ids": ids}
        out = model(**given)
        return learn(given, out, out.loss)

    changed = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 5)
    assert not torch.equal(changed, inputs["input_ids"])
    torch.testing.assert_close(of(inputs["input_ids"]), of(changed))


def test_other_labels_are_refused():
    class Wide(nn.Module):
        def forward(self, **_):
            return type("Out", (), {"logits": torch.zeros(3, 9)})

    model, inputs = tiny("bert"), batch("bert")
    out = model(**inputs)
    with pytest.raises(MethodError, match="same labels"):
        Teacher(Wide(), Distillation(teacher="x"))(inputs, out, out.loss)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("length", [7, 4])
def test_a_teacher_with_a_decoder_reads_the_same_words(family, length):
    model, teacher, inputs = tiny(family), tiny(family, seed=1), dict(batch(family))
    inputs["labels"] = inputs["input_ids"][:, :length].clone()
    inputs["labels"][0, 2:] = -100  # as many words as the input has, and other padding
    out = model(**inputs)
    found = Teacher(teacher, Distillation(teacher="x", weight=1.0))(inputs, out, out.loss)
    real = inputs["labels"] != -100
    with torch.no_grad():
        known = teacher(**inputs).logits
    torch.testing.assert_close(found, divergence(out.logits[real], known[real]))
