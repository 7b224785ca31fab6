"""GraSP against the explicit Hessian of a small net; the sign, the sum, the temperature."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import LoRA, Pfeiffer
from slimtune.sparsity.grasp import GraSP
from slimtune.sparsity.target import Target, targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, randomize, tiny

PLAIN = GraSP(temperature=1)


def net_view(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    data = [{"x": torch.randn(5, 4).double(), "y": torch.tensor([0, 1, 1, 0, 1])} for _ in range(2)]
    found = {n: Target(n, p) for n, p in net.named_parameters()}
    return View(SimpleNamespace(model=net), found, data, loss=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))


def of_vector(seen):
    """(theta, the loss of all batches as a function of it)."""
    shapes = {n: t.parameter.shape for n, t in seen.targets.items()}

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes.values()])
        values = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return sum(F.cross_entropy(torch.func.functional_call(seen.model, values, (b["x"],)), b["y"])
                   for b in seen.batches)
    return torch.cat([t.parameter.detach().flatten() for t in seen.targets.values()]), loss


def flat(scores):
    return torch.cat([s.flatten() for s in scores.values()])


def test_against_the_explicit_hessian():
    seen = net_view()
    theta, loss = of_vector(seen)
    g = torch.autograd.functional.jacobian(loss, theta)
    H = torch.autograd.functional.hessian(loss, theta)
    scores = flat(PLAIN.score(seen))
    torch.testing.assert_close(scores, theta * (H @ g))
    torch.testing.assert_close(-(-scores).sum(), theta @ H @ g)  # the paper's scores, -theta * Hg, sum to -theta^T H g


def test_a_negative_score_is_of_a_weight_without_which_the_gradient_grows():
    seen = net_view()
    theta, loss = of_vector(seen)

    def flow(at):
        return torch.autograd.functional.jacobian(loss, at).square().sum()

    scores, h = flat(PLAIN.score(seen)), 1e-6
    for j in range(0, len(theta), 3):
        less, more = theta.clone(), theta.clone()
        less[j] *= 1 - h
        more[j] *= 1 + h
        torch.testing.assert_close((flow(less) - flow(more)) / (2 * h), -2 * scores[j], rtol=1e-4, atol=1e-8)


def test_on_a_quadratic():
    torch.manual_seed(1)
    A = torch.randn(6, 6).double()
    A = A @ A.T
    w = nn.Parameter(torch.randn(2, 3).double())
    net = nn.Module()
    net.w = w
    seen = View(SimpleNamespace(model=net), {"w": Target("w", w)}, [{}],
                loss=lambda m, b: 0.5 * m.w.flatten() @ A @ m.w.flatten())
    theta = w.detach().flatten()
    torch.testing.assert_close(flat(PLAIN.score(seen)), theta * (A @ (A @ theta)))


def test_of_a_loss_without_curvature_it_is_zero():
    w = nn.Parameter(torch.ones(2, 3).double())
    net = nn.Module()
    net.w = w
    seen = View(SimpleNamespace(model=net), {"w": Target("w", w)}, [{}], loss=lambda m, b: m.w.sum())
    assert not flat(PLAIN.score(seen)).any()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_temperature_divides_the_logits(family):
    delta = randomize(attach(tiny(family).double(), LoRA(rank=2)))
    data = [batch(family)]

    def smooth(model, b):
        z = model(**b).logits / 200
        return (F.cross_entropy(z[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten()) if family == "gpt2"
                else F.cross_entropy(z, b["labels"]))

    own = GraSP().score(View(delta, targets(delta), data))
    slow = PLAIN.score(View(delta, targets(delta), data, loss=smooth))
    assert flat(own).any()
    size = flat(slow).abs().max()  # a language model's loss is in float32 whatever its weights are
    torch.testing.assert_close(flat(own) / size, flat(slow) / size, rtol=1e-4, atol=1e-6)


def test_official_is_without_temperature_and_divided_by_the_sum():
    delta = randomize(attach(tiny("bert").double(), Pfeiffer(bottleneck=3)))
    seen = View(delta, targets(delta), [batch("bert", seed=s) for s in range(2)])
    paper, official = flat(PLAIN.score(seen)), flat(GraSP(compat="official").score(seen))
    torch.testing.assert_close(official, paper / (paper.sum().abs() + 1e-10), rtol=1e-6, atol=0)


def test_a_model_without_a_head_needs_temperature_one():
    delta = attach(tiny("bert").bert, Pfeiffer(bottleneck=3))
    seen = View(delta, targets(delta), [batch("bert", labels=False)],
                loss=lambda m, b: m(**b).last_hidden_state.square().mean())
    with pytest.raises(MethodError, match="temperature=1"):
        GraSP().score(seen)
    assert flat(PLAIN.score(seen)).any()
