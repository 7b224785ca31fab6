"""SNIP: the derivative by a mask at 1, by finite differences; scores sum to 1 and do not see the loss's scale."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import LoRA, Pfeiffer
from slimtune.sparsity.snip import SNIP
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, randomize, tiny

DATA = [batch("bert", seed=0), batch("bert", size=2, seed=1)]


def view(**more):
    delta = randomize(attach(tiny("bert").double(), Pfeiffer(bottleneck=3)))
    return View(delta, targets(delta), DATA, **more)


def test_is_the_derivative_by_a_mask():
    """|dL/dm|, m on one weight at a time, over the sum of |dL/dm| of all weights of a small delta."""
    seen = view()
    scores = SNIP().score(seen)

    def loss():
        with torch.no_grad():
            return sum(seen.model(**b).loss for b in DATA)

    flat = {}
    for name in list(seen.targets)[:2]:
        w = seen.targets[name].parameter
        values = w.detach().flatten()
        for i in (0, 7, 40):
            w.data.view(-1)[i] = values[i] * (1 + 1e-5)
            up = loss()
            w.data.view(-1)[i] = values[i] * (1 - 1e-5)
            down = loss()
            w.data.view(-1)[i] = values[i]
            flat[name, i] = ((up - down) / 2e-5).abs()
    own = torch.stack([scores[name].flatten()[i] for name, i in flat])
    slow = torch.stack(list(flat.values()))
    torch.testing.assert_close(own / own.sum(), slow / slow.sum(), rtol=1e-5, atol=1e-8)


def test_sum_is_one_and_the_scale_of_the_loss_is_nothing():
    scores = SNIP().score(view())
    torch.testing.assert_close(sum(s.sum() for s in scores.values()), torch.tensor(1.0).double())
    more = SNIP().score(view(loss=lambda model, b: 7 * model(**b).loss))
    for name, s in scores.items():
        torch.testing.assert_close(more[name], s)


def test_gradients_are_summed_before_they_lose_their_sign():
    """Of a batch and its negative nothing is left."""
    signs = iter([1.0, -1.0])
    seen = view(loss=lambda model, b: next(signs) * model(**DATA[0]).loss)
    with pytest.raises(MethodError, match="is 0"):
        SNIP().score(seen)


def test_a_fresh_lora_is_refused():
    delta = attach(tiny("bert"), LoRA(rank=2))
    with pytest.raises(MethodError, match="B is 0"):
        SNIP().score(View(delta, targets(delta), DATA))


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(MethodError, match="not finite"):
        SNIP().score(view(loss=lambda model, b: model(**b).loss * float("nan")))


def test_no_data():
    delta = attach(tiny("bert"), Pfeiffer(bottleneck=3))
    with pytest.raises(MethodError, match="got none"):
        SNIP().score(View(delta, targets(delta)))
