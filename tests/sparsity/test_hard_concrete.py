"""Hard-concrete constants of the literature, a Monte-Carlo estimate, and the gradient; the Lagrangian on a toy."""
import math
from itertools import pairwise

import pytest
import torch
from scipy.special import expit

from slimtune.errors import RecipeError
from slimtune.sparsity.hard_concrete import HardConcrete
from slimtune.sparsity.lagrangian import Lagrangian

LAW = HardConcrete()


@pytest.mark.parametrize(("log_alpha", "alive", "gate"), [(-2.0, 0.400975, 0.043044), (0.0, 0.831822, 0.5),
                                                         (2.0, 0.973367, 0.956956), (1.609438, 0.961136, 0.9)])
def test_the_constants(log_alpha: float, alive: float, gate: float):
    value = torch.tensor(log_alpha, dtype=torch.float64)
    assert float(LAW.alive(value)) == pytest.approx(alive, abs=1e-6)
    assert float(LAW.gate(value)) == pytest.approx(gate, abs=1e-6)
    assert float(LAW.gate(-value)) == pytest.approx(1 - gate, abs=1e-6)
    assert LAW.start(gate) == pytest.approx(log_alpha, abs=2e-5)  # the table's gates have six places


def test_the_shift_and_where_a_gate_is_exactly_0():
    assert LAW.shift == pytest.approx(1.598597, abs=1e-6)
    assert HardConcrete(beta=1.0).shift == pytest.approx(2.397895, abs=1e-6)
    edge = torch.tensor([-2.397895 - 1e-5, -2.397895 + 1e-5], dtype=torch.float64)
    assert (LAW.gate(edge) == 0).tolist() == [True, False]
    with pytest.raises(RecipeError):
        LAW.start(1.0)
    with pytest.raises(RecipeError):
        HardConcrete(gamma=0.1)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 2.0])
def test_a_million_draws_live_as_often_as_it_says(log_alpha: float):
    drawn = LAW.sample(torch.full((1_000_000,), log_alpha), torch.Generator().manual_seed(3))
    expected = 1 - expit(LAW.beta * math.log(0.1 / 1.1) - log_alpha)  # the distribution function at 0
    assert float((drawn > 0).double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 1e6))
    closed = expit(LAW.beta * math.log(1.1 / 0.1) - log_alpha)          # and at 1
    assert float((drawn < 1).double().mean()) == pytest.approx(closed, abs=4 * math.sqrt(0.25 / 1e6))


def test_gradients_of_the_regulariser_and_of_a_draw_are_the_formulas():
    log_alpha = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    LAW.alive(log_alpha).mean().backward()
    p = LAW.alive(log_alpha.detach())
    torch.testing.assert_close(log_alpha.grad, p * (1 - p) / 41)

    log_alpha.grad = None
    drawn = LAW.sample(log_alpha, torch.Generator().manual_seed(0))
    drawn.sum().backward()
    u = torch.rand(41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.sigmoid(((u / (1 - u)).log() + log_alpha.detach()) * 1.5)
    inside = (s * 1.2 - 0.1 > 0) & (s * 1.2 - 0.1 < 1)
    torch.testing.assert_close(log_alpha.grad, torch.where(inside, 1.2 * s * (1 - s) * 1.5, 0.0))
    torch.testing.assert_close(drawn.detach(), (s * 1.2 - 0.1).clamp(0, 1))


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_the_lagrangian_reaches_its_target_where_the_loss_pulls_away(target: float):
    """Closing gate j costs j / 100: the cheap ones go, and just so many."""
    log_alpha = torch.full((100,), 2.0, requires_grad=True)
    costs = torch.arange(100) / 100
    holds = Lagrangian(target, ramp=100)
    optimizer, ascent = torch.optim.Adam([log_alpha], lr=0.05), holds.ascent(0.05)
    squares = []
    for step in range(1200):
        sparsity = 1 - LAW.alive(log_alpha).mean()
        loss = ((1 - LAW.alive(log_alpha)) * costs).mean() + holds(sparsity, step)
        optimizer.zero_grad()
        ascent.zero_grad()
        loss.backward()
        optimizer.step()
        ascent.step()
        squares.append(holds.square.item())
    found = (1 - LAW.alive(log_alpha.detach())).mean().item()
    assert abs(found - target) < 0.01
    assert all(a <= b for a, b in pairwise(squares))
    kept = LAW.alive(log_alpha.detach())
    assert float(kept[:20].mean()) < float(kept[80:].mean())
    with pytest.raises(RecipeError):
        Lagrangian(0.2, start=0.5)
