"""Movement: one weight on a quadratic, slow sums, blocks, the soft form's penalty, and a loop with masks."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, Gates
from slimtune.sparsity.movement import Movement, soft_masks
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, loss, tiny


def full(family="bert", sites=("linear",)):
    delta = attach(tiny(family).double(), Full())
    return View(delta, targets(delta, "base", sites=sites, blocks=(0,)), [batch(family)])


def noise(seen, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(w.shape, generator=g, dtype=w.dtype) for n, w in seen.weights.items()}


@pytest.mark.parametrize(("target", "rises"), [(3.0, True), (0.2, False)])
def test_a_weight_that_moves_away_from_zero_rises(target, rises):
    """L = 1/2 (w - target)^2 from w = 1, by gradient descent: S rises as |w| does, and falls with it."""
    seen = full(sites=("attn.q",))
    name, = seen.targets
    w, rule = torch.ones_like(seen.weights[name]), Movement()
    for _ in range(5):
        rule.observe(seen, {name: w - target}, {name: w})
        w = w - 0.1 * (w - target)
    assert bool((rule.score(seen)[name] > 0).all()) is rises


def test_scores_are_minus_the_sum():
    seen, rule = full(), Movement(rate=0.5)
    steps = [(noise(seen, 2 * i), noise(seen, 2 * i + 1)) for i in range(3)]
    for gradients, weights in steps:
        rule.observe(seen, gradients, weights)
    for name, s in rule.score(seen).items():
        torch.testing.assert_close(s, -0.5 * sum(g[name] * w[name] for g, w in steps))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_blocks_and_neurons(family):
    """A score for each block of 4 outputs and 8 inputs, and in the network for each neuron, however it is stored."""
    seen, rule = full(family), Movement(rate=1, rows=4, columns=8, neurons=True)
    gradients, weights = noise(seen, 0), noise(seen, 1)
    rule.observe(seen, gradients, weights)
    for name, score in rule.score(seen).items():
        target, product = seen.targets[name], -gradients[name] * weights[name]
        if target.transposed:
            score, product = score.T, product.T
        role = target.sites[0].role
        rows, columns = (1, 32) if role == "mlp.up" else (32, 1) if role == "mlp.down" else (4, 8)
        for i in range(0, score.shape[0], rows):
            for j in range(0, score.shape[1], columns):
                block = slice(i, i + rows), slice(j, j + columns)
                torch.testing.assert_close(score[block], product[block].sum().expand(rows, columns))


def test_whole_rows():
    seen = full(sites=("attn.q",))
    rule, (name,) = Movement(rate=1, columns=0), seen.targets
    g, w = noise(seen, 0), noise(seen, 1)
    rule.observe(seen, g, w)
    torch.testing.assert_close(rule.score(seen)[name], -(g[name] * w[name]).sum(1, keepdim=True).expand(32, 32))


def test_soft_form_follows_the_gradient_of_its_penalty():
    """By autograd: lambda times the mean over the attention's matrices plus that over the others, of mean sigma(S)."""
    seen, rule = full(), Movement(rate=2.0, strength=3.0)
    rule.observe(seen, noise(seen, 0), noise(seen, 1))
    before = {n: s.clone().requires_grad_() for n, s in rule.score(seen).items()}
    kinds = {n: t.sites[0].role.startswith("attn") for n, t in seen.targets.items()}
    penalty = sum(torch.stack([before[n].sigmoid().mean() for n in before if kinds[n] is kind]).mean()
                  for kind in (True, False))
    assert rule.penalty(seen) == pytest.approx(penalty.item())
    g, w = noise(seen, 2), noise(seen, 3)
    slow = torch.autograd.grad(3.0 * penalty, list(before.values()))
    rule.observe(seen, g, w)
    for (name, s), p in zip(before.items(), slow, strict=True):
        torch.testing.assert_close(rule.score(seen)[name], s.detach() - 2.0 * (g[name] * w[name] + p))
    rule.observe(seen, g, w, strength=0.0)


def test_adam_is_torchs():
    seen, rule = full(sites=("attn.q",)), Movement(rate=0.1, step="adam")
    name, = seen.targets
    s = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.double))
    adam = torch.optim.Adam([s], lr=0.1)
    for i in range(4):
        g, w = noise(seen, 2 * i), noise(seen, 2 * i + 1)
        rule.observe(seen, g, w)
        s.grad = g[name] * w[name]
        adam.step()
    torch.testing.assert_close(rule.score(seen)[name], s.detach())


def test_soft_masks():
    scores = {"w": torch.linspace(-4, 4, 1000).view(10, 100)}
    assert soft_masks(scores, 0.0)["w"].all()  # tau = 0 is dense
    assert int(soft_masks(scores, 0.1)["w"].sum()) == int((scores["w"].sigmoid() > 0.1).sum()) < 1000
    few = soft_masks({"w": scores["w"] - 100}, 0.1)["w"]
    assert few.flatten().nonzero().flatten().tolist() == list(range(995, 1000))
    assert int(soft_masks({"w": scores["w"] - 100}, 0.1, compat="official")["w"].sum()) == 6
    flat = {"w": torch.full((1000,), -9.0)}
    assert int(soft_masks(flat, 0.1)["w"].sum()) == 5
    assert int(soft_masks(flat, 0.1, compat="official")["w"].sum()) == 0


def test_a_loop_with_masks():
    """Raw gradients at masked entries count: a weight that is masked can earn its place back."""
    seen, rule, slow = full(), Movement(), {}
    shadow = {n: w.clone() for n, w in seen.weights.items()}
    masks = {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.3 for n, w in shadow.items()}
    for _ in range(2):
        for n, t in seen.targets.items():
            t.parameter.data.copy_(shadow[n] * masks[n])
        seen.model.zero_grad()
        loss(seen.model, seen.batches[0]).backward()
        raw = {n: t.parameter.grad.clone() for n, t in seen.targets.items()}
        rule.observe(seen, raw, shadow)
        for n in shadow:
            slow[n] = slow.get(n, 0) - 1e-2 * raw[n] * shadow[n]
            shadow[n] = shadow[n] - 0.1 * raw[n] * masks[n]
        scores = rule.score(seen)
        masks = {n: s > s.median() for n, s in scores.items()}
    for n, s in scores.items():
        torch.testing.assert_close(s, slow[n])
        assert s[~masks[n]].any()


def test_goes_on_from_what_was_seen():
    a, b, rule = full(), full(), Movement(step="adam")
    steps = [(noise(a, 2 * i), noise(a, 2 * i + 1)) for i in range(4)]
    for step in steps:
        rule.observe(a, *step)
    for step in steps[:2]:
        rule.observe(b, *step)
    c = full()
    rule.resume(c, rule.seen(b))
    for step in steps[2:]:
        rule.observe(c, *step)
    for name, s in rule.score(a).items():
        assert torch.equal(rule.score(c)[name], s)


def test_refusals():
    seen = full()
    with pytest.raises(MethodError, match="observe"):
        Movement().score(seen)
    with pytest.raises(MethodError, match="do not divide"):
        Movement(rows=5).observe(seen, noise(seen, 0), noise(seen, 1))
    with pytest.raises(MethodError, match="no gradient"):
        Movement().observe(seen, {}, {})


def test_gates_have_a_score_each():
    delta = attach(tiny("bert"), [Full(), Gates()])
    seen = View(delta, targets(delta, "gates"), [batch("bert")])
    rule, gradients = Movement(rate=0.1, rows=4), seen.gradients(batch("bert"))
    rule.observe(seen, gradients, seen.weights)
    for name, score in rule.score(seen).items():
        torch.testing.assert_close(score, -0.1 * gradients[name] * seen.weights[name])
