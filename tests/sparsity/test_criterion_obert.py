"""oBERT: the recursion against the direct inverse, the update against the exact least of a quadratic."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, LoRA
from slimtune.sparsity.gradients import gradients
from slimtune.sparsity.obert import OBERT, downdate, moved, saliency
from slimtune.sparsity.target import Target, targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, tiny

D = torch.double


def spd(n, size, seed=0):
    a = torch.randn(n, size, size, dtype=D, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT + 0.1 * torch.eye(size, dtype=D)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("together", [1, 4, 10])
def test_the_recursion_is_the_inverse(together):
    g, m, damp = rand(3, 20, 6), 20, 1e-4
    inverse = (torch.eye(6, dtype=D) / damp).repeat(3, 1, 1)
    for part in g.split(together, 1):
        downdate(inverse, part, m)
    direct = torch.linalg.inv(damp * torch.eye(6, dtype=D) + g.mT @ g / m)
    torch.testing.assert_close(inverse, direct, rtol=1e-6, atol=1e-9)


def least(F, w, gone):
    """min of 1/2 d^T F d with d = -w where it goes, by eliminating the rest; (value, w + d)."""
    rest = [i for i in range(len(w)) if i not in gone]
    d = torch.zeros_like(w)
    d[gone] = -w[gone]
    d[rest] = torch.linalg.solve(F[rest][:, rest], F[rest][:, gone] @ w[gone])
    return 0.5 * d @ F @ d, w + d


def test_saliency_and_update_are_exact_on_a_quadratic():
    """The loss that is predicted is that which the quadratic then has; no other update has less."""
    F, w = spd(2, 6), rand(2, 6, seed=1)
    inverse = torch.linalg.inv(F)
    for group in (1, 2, 3):
        score = saliency(w, inverse, group)
        for n in range(2):
            for at in range(0, 6, group):
                gone = list(range(at, at + group))
                keep = torch.ones(2, 6, dtype=torch.bool)
                keep[n, gone] = False
                after = moved(w, inverse, keep)
                rise, best = least(F[n], w[n], gone)
                torch.testing.assert_close(score[n, gone], rise.expand(group))
                torch.testing.assert_close(after[n], best)
                torch.testing.assert_close(0.5 * (after[n] - w[n]) @ F[n] @ (after[n] - w[n]), rise)
                assert not after[n, gone].any()
                assert torch.equal(after[1 - n], w[1 - n])


def test_what_goes_together_is_moved_together():
    F, w = spd(1, 8, seed=3), rand(1, 8, seed=4)
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]]).bool()
    torch.testing.assert_close(moved(w, torch.linalg.inv(F), keep)[0], least(F[0], w[0], [1, 2, 5])[1])


def full(family="bert", **more):
    delta = attach(tiny(family).double(), Full())
    return View(delta, targets(delta, "base", sites=("mlp.down",), blocks=(0,)),
                [batch(family, seed=s) for s in range(3)], **more)


def direct(seen, rule):
    """F of the one target's blocks, from gradients as rows of (d_out, d_in)."""
    (name, target), = seen.targets.items()
    rows = torch.stack([g[name].T.flatten() if target.transposed else g[name].flatten()
                        for g in gradients(seen, "test", rule.per)])
    cut = rows.view(len(rows), -1, rule.block).transpose(0, 1)
    return rule.damp * torch.eye(rule.block, dtype=D) + cut.mT @ cut / len(rows), name, target


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_scores_and_update_of_a_model(family, per):
    """Blocks run along the inputs, whichever way the weight is stored."""
    seen, rule = full(family), OBERT(block=16, per=per, damp=1e-6)
    F, name, target = direct(seen, rule)
    before = seen.weights[name].clone()
    score = rule.score(seen)[name]
    turned = before.T if target.transposed else before
    slow = turned.reshape(-1, 16) ** 2 / (2 * torch.linalg.inv(F).diagonal(dim1=1, dim2=2))
    torch.testing.assert_close((score.T if target.transposed else score).reshape(-1, 16), slow, rtol=1e-6, atol=0)
    mask = score > score.median()
    rule.repair(seen, {name: mask})
    after = seen.weights[name]
    assert not after[~mask].any()
    keep = (mask.T if target.transposed else mask).reshape(-1, 16)
    now = (after.T if target.transposed else after).reshape(-1, 16)
    for n in (0, len(F) // 2, len(F) - 1):
        gone = (~keep[n]).nonzero().flatten().tolist()
        torch.testing.assert_close(now[n], least(F[n], turned.reshape(-1, 16)[n], gone)[1], rtol=1e-4, atol=1e-7)


def test_blocks_of_one_are_the_diagonal():
    seen, rule = full(), OBERT(block=1, damp=1e-5)
    F, name, _ = direct(seen, rule)
    torch.testing.assert_close(rule.score(seen)[name], 0.5 * F.view(32, 64) * seen.weights[name] ** 2,
                               rtol=1e-6, atol=0)


def test_pieces_and_gradients_at_most():
    """Less memory gives the same; so do the first two batches alone, where two gradients are allowed."""
    delta = attach(tiny("bert").double(), Full())
    data = [batch("bert", seed=s) for s in range(3)]
    seen = View(delta, targets(delta, "base", blocks=(0,)), data)
    whole = OBERT(block=10, gradients=2).score(View(delta, seen.targets, data[:2]))
    masks = {name: s > s.median() for name, s in whole.items()}
    start = {name: w.clone() for name, w in seen.weights.items()}
    results = []
    for rule in (OBERT(block=10, gradients=2), OBERT(block=10, gradients=2, limit=50_000)):
        for name, s in rule.score(seen).items():
            torch.testing.assert_close(s, whole[name], rtol=1e-6, atol=0)
        rule.repair(seen, masks)
        results.append({name: w.clone() for name, w in seen.weights.items()})
        for name, t in seen.targets.items():
            t.parameter.data.copy_(start[name])
    for name in start:
        assert not torch.equal(results[0][name], start[name] * masks[name])
        torch.testing.assert_close(results[0][name], results[1][name])


def test_the_dead_have_no_part():
    """Saliency and update of what lives are those of the Fisher matrix without the dead rows and columns."""
    seen, rule = full(), OBERT(block=8, damp=1e-9)
    dead = torch.zeros(32, 64, dtype=torch.bool)
    dead[:, ::3] = True
    F, name, _ = direct(seen, rule)  # gradients at the weights as they are, dead ones included
    seen.masks = {name: ~dead}
    score, alive = rule.score(seen)[name], (~dead).reshape(-1, 8)[0].nonzero().flatten()
    slow = seen.weights[name].reshape(-1, 8)[0, alive] ** 2 / (2 * torch.linalg.inv(F[0][alive][:, alive]).diagonal())
    torch.testing.assert_close(score.reshape(-1, 8)[0, alive], slow, rtol=1e-6, atol=0)


def test_the_update_lowers_a_quadratic_loss():
    """On least squares whose Fisher matrix is the Hessian, the update is better than the mask alone."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1, 6, dtype=D))
    net = nn.Module()
    net.w = w
    A = spd(1, 6)[0]
    root = torch.linalg.cholesky(A) * 6**0.5  # columns g_i with 1/6 sum g g^T = A
    seen = View(SimpleNamespace(model=net, tensors=lambda: {"w": w}, name="d"), {"w": Target("w", w)},
                [{"g": root[:, i]} for i in range(6)], loss=lambda m, b: m.w[0] @ b["g"])
    rule, start = OBERT(block=6, damp=1e-9), w.detach().clone()
    score = rule.score(seen)["w"]
    mask = score > score.median()

    def rise(x):
        return 0.5 * ((x - start) @ A @ (x - start).T).item()

    rule.repair(seen, {"w": mask})
    assert rise(w.detach()) < 0.9 * rise(start * mask)


def test_weights_that_are_not_trained_are_not_moved():
    delta = attach(tiny("bert"), LoRA(rank=2))
    seen = View(delta, targets(delta, "base", blocks=(0,)), [batch("bert")])
    with pytest.raises(MethodError, match="Full"):
        OBERT().score(seen)
    before = {n: w.clone() for n, w in seen.weights.items()}
    rule = OBERT(update=False)
    masks = {n: s > s.median() for n, s in rule.score(seen).items()}
    rule.repair(seen, masks)
    assert all(torch.equal(before[n], w) for n, w in seen.weights.items())


def test_groups_must_fit():
    with pytest.raises(MethodError, match="does not divide"):
        OBERT(block=50, group=4)
    seen = full()
    with pytest.raises(MethodError, match="64 inputs"):
        OBERT(block=6, group=3).score(seen)
