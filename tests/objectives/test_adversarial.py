"""FreeLB against a loop over `inputs_embeds`, the start's bound, the plain loss as a special case, what it leaves."""
import math

import pytest
import torch
from torch import Tensor, nn

from slimtune.errors import MethodError, RecipeError, SiteError
from slimtune.objectives import FreeLB, adversarial_backward, offset, word_embeddings
from slimtune.objectives.adversarial import ascend, norm, uniform_start
from slimtune.testing import batch, tiny


def double(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return tiny(family).double(), batch(family)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("max_norm", [None, 0.02])
def test_the_passes_are_those_of_a_loop_over_inputs_embeds(max_norm: float | None):
    model, data = double("bert")
    spec = FreeLB(steps=3, rate=0.03, start=0.05, max_norm=max_norm)
    mean = adversarial_backward(model, data, spec, generator=torch.Generator().manual_seed(1))
    found = gradients(model)

    words, mask = model.bert.embeddings.word_embeddings, data["attention_mask"].double()
    drawn = torch.rand((*mask.shape, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = torch.stack([(2 * row - 1) * 0.05 / math.sqrt(int(m.sum()) * 32) * m[:, None]
                     for row, m in zip(drawn, mask, strict=True)])
    losses = []
    for _ in range(3):
        d = d.detach().requires_grad_()
        loss = model(inputs_embeds=words(data["input_ids"]) + d, attention_mask=data["attention_mask"],
                     labels=data["labels"]).loss
        (loss / 3).backward()
        losses.append(loss.item())
        rows = []
        for row, g in zip(d.detach(), d.grad, strict=True):
            row = row + 0.03 * g / g.norm()
            rows.append(row if max_norm is None or row.norm() <= max_norm else row * max_norm / row.norm())
        d = torch.stack(rows)
    assert mean == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert losses[2] > losses[0]  # the adversary climbs
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "t5", "bart"])
def test_without_disturbance_it_is_the_clean_loss(family: str):
    model, data = double(family)
    mean = adversarial_backward(model, data, FreeLB(steps=2, rate=0, start=0))
    found = gradients(model)
    clean = model(**data).loss
    clean.backward()
    assert mean == pytest.approx(clean.item(), rel=1e-12)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_that_shares_the_table_is_not_disturbed(family: str):
    model, data = double(family)
    with offset(model, data) as added:
        added.value = torch.randn(3, 7, 32, dtype=torch.float64)
        found = model(**data).logits
    encoded = model.get_encoder()(inputs_embeds=word_embeddings(model)(data["input_ids"]) + added.value,
                                  attention_mask=data["attention_mask"])
    expected = model(encoder_outputs=encoded, attention_mask=data["attention_mask"], labels=data["labels"]).logits
    torch.testing.assert_close(found, expected)


def test_the_start_is_bounded_for_each_sentence_and_0_on_padding():
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    mask[0, 10:] = 0
    words = nn.Embedding(3, 768)
    with offset(words, {"input_ids": ids, "attention_mask": mask}, words) as added:
        start = uniform_start(added, 0.05)
    bound = 0.05 / math.sqrt(10 * 768)
    assert bound == pytest.approx(5.705e-4, rel=1e-3)
    assert 0.99 * bound < float(start[0].abs().max().detach()) <= bound
    assert not start[0, 10:].any()
    assert 0.99 < float(start[1].abs().max()) / (0.05 / math.sqrt(12 * 768)) <= 1
    assert bool((norm(start) <= 0.05).all())


def test_an_ascent_that_leaves_the_ball_ends_on_it():
    value, gradient, mask = torch.zeros(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, 3, 1)
    gradient[1] = 0
    moved = ascend(value, gradient, 0.5, mask, None)
    torch.testing.assert_close(norm(moved).flatten(), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(norm(ascend(value, gradient, 0.5, mask, 0.2)).flatten(), torch.tensor([0.2, 0.0]))


def test_no_hook_stays_when_a_pass_fails():
    model, data = tiny("bert"), batch("bert")

    def fails(model: nn.Module, data: object) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        adversarial_backward(model, data, FreeLB(), loss=fails)
    assert not word_embeddings(model)._forward_hooks


def test_what_cannot_be_disturbed_is_refused():
    with pytest.raises(SiteError, match="no word embeddings"):
        word_embeddings(tiny("vit"))
    model, data = tiny("bert"), batch("bert")

    def looks_up_others(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return model(**{**data, "input_ids": data["input_ids"].clone()}).loss

    with pytest.raises(SiteError, match="were not read"):
        adversarial_backward(model, data, FreeLB(), loss=looks_up_others)
    with pytest.raises(RecipeError, match="steps"):
        FreeLB(steps=0)


def test_the_official_passes_leave_token_types_out():
    model, data = double("bert")
    typed = data | {"token_type_ids": torch.ones_like(data["input_ids"])}
    plain, official = FreeLB(steps=1, start=0), FreeLB(steps=1, start=0, compat="official")
    assert adversarial_backward(model, typed, official) == adversarial_backward(model, data, plain)
    assert adversarial_backward(model, typed, plain) != adversarial_backward(model, data, plain)


def test_a_batch_without_labels_is_refused():
    inputs = {key: value for key, value in batch("bert").items() if key != "labels"}
    with pytest.raises(MethodError, match="returned no loss"):
        adversarial_backward(tiny("bert"), inputs, FreeLB())
