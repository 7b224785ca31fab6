"""L0: gates reach the sparsity they are trained to, keep what the loss needs, and leave the model as it was."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, Pfeiffer
from slimtune.sparsity.hard_concrete import HardConcrete
from slimtune.sparsity.l0 import L0
from slimtune.sparsity.target import Target, targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, randomize, tiny


def planted(rows=1, columns=1):
    """W of one size; the loss reads the first quarter of its inputs alone, so that the others can go."""
    torch.manual_seed(0)
    net = nn.Linear(16, 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.where(torch.rand(4, 16) > 0.5, 1.0, -1.0))
    x = torch.randn(64, 16)
    x[:, 4:] = 0
    data = [{"x": x, "y": net(x).detach()}]
    seen = View(SimpleNamespace(model=net), {"w": Target("w", net.weight)}, data,
                loss=lambda m, b: (m(b["x"]) - b["y"]).square().mean() + 0 * m.weight.sum())
    return seen, L0(sparsity=0.75, steps=300, rows=rows, columns=columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 4)])
def test_keeps_what_the_loss_needs(rows, columns):
    seen, rule = planted(rows, columns)
    before = seen.weights["w"].clone()
    scores = rule.score(seen)["w"]
    assert scores.shape == (4, 16)
    assert scores[:, :4].min() > scores[:, 4:].max()
    assert torch.equal(seen.weights["w"], before)
    assert 1 - HardConcrete().alive(scores).mean().item() == pytest.approx(0.75, abs=0.05)


def test_on_a_delta_it_leaves_all_as_it_was():
    delta = randomize(attach(tiny("bert"), Pfeiffer(bottleneck=3)))
    delta.model.train()
    seen = View(delta, targets(delta), [batch("bert")])
    before = {n: w.clone() for n, w in delta.state().items()}
    scores = L0(steps=3).score(seen)
    again = L0(steps=3).score(seen)
    assert all(torch.equal(scores[n], again[n]) and scores[n].shape == w.shape for n, w in seen.weights.items())
    assert all(torch.equal(before[n], w) for n, w in delta.state().items())
    assert all(p.grad is None for p in delta.model.parameters())
    assert all(p.requires_grad for p in delta.parameters())
    assert delta.model.training


def test_a_loss_that_is_not_finite_is_refused():
    seen, rule = planted()
    seen.loss = lambda m, b: m.weight.sum() * float("nan")
    with pytest.raises(MethodError, match="the loss at step 0"):
        rule.score(seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_on_weights_of_16_bits_learn_in_32(dtype):
    delta = attach(tiny("bert").to(dtype), Full())
    scores = L0(steps=10).score(View(delta, targets(delta, "base"), [batch("bert")]))
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert bool(flat.isfinite().all())
    assert len(flat.unique()) > 0.9 * len(flat)  # so that few ties are broken by their order alone
