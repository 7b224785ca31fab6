"""Metrics of attacks by their identities and a published row; PGD against a linear model's exact answer."""
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from slimtune.errors import DataError, RecipeError
from slimtune.objectives import Attacked, Robustness, pgd, word_embeddings
from slimtune.objectives.attack import PGD
from slimtune.testing import batch, tiny


@pytest.mark.parametrize(("clean", "held", "success"), [(941, 78, 91.7), (938, 552, 41.2), (920, 29, 96.8),
                                                       (909, 179, 80.3)])
def test_success_is_what_the_published_rows_say(clean: int, held: int, success: float):
    rows = [Attacked(i < clean, held <= i < clean, 7 if i < clean else 1) for i in range(1000)]
    found = Robustness.of(rows)
    assert (found.clean, found.under_attack, found.queries, found.examples) == (clean / 1000, held / 1000, 7, 1000)
    assert 100 * found.success == pytest.approx(success, abs=0.1)
    assert found.success == pytest.approx(sum(a.broken for a in rows) / sum(a.right for a in rows))


def test_a_model_that_is_never_right_has_no_success_and_nothing_is_an_error():
    assert Robustness.of([Attacked(False, False, 1)]).success == 0
    with pytest.raises(DataError):
        Robustness.of([])
    with pytest.raises(RecipeError):
        PGD(0.5, 0.1, start=0.6)


class Linear(nn.Module):
    """logits [0, 2 w . sum of the embeddings of tokens that are there]"""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding.from_pretrained(torch.randn(9, 4, generator=generator))
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 1.0]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        score = (self.words(input_ids) * attention_mask[..., None]).sum(1) @ self.w
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(score), score], -1))


def test_pgd_breaks_just_what_the_ball_reaches():
    model, generator = Linear(), torch.Generator().manual_seed(1)
    ids = torch.randint(9, (64, 5), generator=generator)
    lengths = torch.randint(1, 6, (64,), generator=generator)
    mask = (torch.arange(5) < lengths[:, None]).long()
    with torch.no_grad():
        score = model(ids, mask).logits[:, 1]
    labels = torch.where(torch.arange(64) % 8 == 0, score < 0, score > 0).long()  # every eighth is wrong
    # the steepest way is the same in every token, so a ball of radius r moves the score by r |w| sqrt(L)
    reach = 0.7 * model.w.detach().norm() * lengths.sqrt()
    found = pgd(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], PGD(0.7, 0.1, 10),
                embed=model.words)
    right = torch.tensor([a.right for a in found])
    assert right.sum() == 56
    sure = (score.abs() - reach).abs() > 1e-4
    assert torch.equal(torch.tensor([a.broken for a in found])[sure], (right & (score.abs() < reach))[sure])
    needed = score.abs() / (0.1 * model.w.detach().norm() * lengths.sqrt())
    steps = torch.where(score.abs() < reach, needed.ceil(), 10)
    queries = torch.where(right, 1 + steps, 1).long()  # the clean pass, and one behind each step
    sure &= (needed - needed.round()).abs() > 1e-3
    assert torch.equal(torch.tensor([a.queries for a in found])[sure], queries[sure])
    assert model.w.grad is None
    assert not model.words._forward_hooks


def test_pgd_goes_further_in_a_larger_ball_and_leaves_the_model_as_it_was():
    model, data = tiny("bert"), batch("bert", size=8)
    with torch.no_grad():
        data["labels"] = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits.argmax(-1)
    small, large = (Robustness.of(pgd(model, [data], PGD(r, r / 4))) for r in (1e-4, 20.0))
    assert (small.clean, small.under_attack) == (1, 1)
    assert large.under_attack < 1
    assert not word_embeddings(model)._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_labels_is_refused():
    inputs = {key: value for key, value in batch("bert").items() if key != "labels"}
    with pytest.raises(DataError, match="needs labels"):
        pgd(tiny("bert"), [inputs], PGD(0.1, 0.05))
