"""SparseGPT against optimal brain surgeon with an inverse for every column; masks, counts, errors, whole models."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, LoRA
from slimtune.sparsity.sparsegpt import SparseGPT, hessians, sparsegpt
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, tiny


def problem(rows=6, inputs=16, seed=0, tokens=64):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.double)
    X = torch.randn(tokens, inputs, generator=g, dtype=torch.double) @ mix
    return torch.randn(rows, inputs, generator=g, dtype=torch.double), X, 2 / tokens * X.T @ X


def damped(H, damp=0.01):
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def surgeon(W, H, mask=None, choose=None, width=None):
    """Column by column, the exact update of what is to the right by the inverse of the rest's Hessian."""
    W, H = W.clone(), damped(H)
    keep = torch.ones_like(W, dtype=torch.bool) if mask is None else mask
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(len(H))]
    for j in range(W.shape[1]):
        if choose is not None and j % width == 0:
            stop = min(j + width, W.shape[1])
            scores = torch.stack([W[:, k] ** 2 / inverses[k][0, 0] for k in range(j, stop)], 1)
            keep[:, j:stop] = choose(scores)
        for i in range(len(W)):
            if not keep[i, j]:
                W[i, j:] = W[i, j:] - W[i, j] / inverses[j][0, 0] * inverses[j][0]
                W[i, j] = 0
    return W, keep


def without(scores, k):
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort()[:k]] = False
    return keep.view_as(scores)


@pytest.mark.parametrize("block", [1, 5, 128])
def test_with_a_mask(block):
    W, _, H = problem()
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    own, same = sparsegpt(W, H, mask=mask, block=block)
    torch.testing.assert_close(own, surgeon(W, H, mask.clone())[0])
    assert torch.equal(same, mask)
    assert not own[~mask].any()


@pytest.mark.parametrize(("compat", "more"), [("paper", 0), ("official", 1)])
def test_chooses_in_each_block_of_columns(compat, more):
    W, _, H = problem()
    own, keep = sparsegpt(W, H, sparsity=0.45, block=8, compat=compat)
    k = int(0.45 * 6 * 8) + more
    slow, mask = surgeon(W, H, choose=lambda s: without(s, k), width=8)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(own, slow)
    assert [int((~keep[:, i:i + 8]).sum()) for i in (0, 8)] == [k, k]


@pytest.mark.parametrize("block", [4, 6, 128])
def test_n_of_m(block):
    W, _, H = problem()
    own, keep = sparsegpt(W, H, pattern=(2, 4), block=block)
    slow, mask = surgeon(W, H, choose=lambda s: torch.stack([without(r, 2) for r in s]), width=4)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(own, slow)
    assert bool((keep.view(6, 4, 4).sum(2) == 2).all())


def test_unrelated_inputs_of_one_size_give_magnitude_and_no_update():
    W, _, _ = problem()
    own, keep = sparsegpt(W, 3.0 * torch.eye(16).double(), sparsity=0.5, block=8)
    for i in (0, 8):
        assert torch.equal(keep[:, i:i + 8], without(W[:, i:i + 8].abs(), 24))
    assert torch.equal(own, W * keep)


@pytest.mark.parametrize("seed", range(3))
def test_error_is_less_than_by_magnitude(seed):
    """On inputs of a few common factors beside noise; on a dense, nearly singular mix, if few columns go at a time."""
    g = torch.Generator().manual_seed(seed)
    W, mixed, _ = problem(rows=16, inputs=64, seed=seed, tokens=512)
    noise, factors = (torch.randn(512, n, generator=g).double() for n in (64, 8))
    few = noise + factors @ torch.randn(8, 64, generator=g).double()
    for X, block, most in ((few, 128, 0.5), (few, 8, 0.5), (mixed, 8, 0.8)):
        own, keep = sparsegpt(W, 2 / 512 * X.T @ X, sparsity=0.5, block=block)
        errors = [(X @ (other - W).T).square().sum()
                  for other in (own, W * keep, W * without(W.abs(), int((~keep).sum())))]
        assert errors[0] < errors[1]
        assert errors[0] <= most * errors[2]


def test_dead_inputs():
    """Their columns go, and the damping's mean has a 1 for each."""
    W, X, _ = problem()
    X[:, 3] = 0
    H = 2 / len(X) * X.T @ X
    own, _ = sparsegpt(W, H, sparsity=0.25)
    assert not own[:, 3].any()
    filled = H + torch.diag((torch.arange(16) == 3).double())
    gone = W.clone()
    gone[:, 3] = 0
    torch.testing.assert_close(own, sparsegpt(gone, filled, sparsity=0.25)[0])


def test_what_was_dead_stays_dead_and_counts():
    W, _, H = problem()
    held = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) > 0.2
    for given in ({"sparsity": 0.5}, {"pattern": (2, 4)}):
        own, keep = sparsegpt(W * held, H, held=held, **given)
        assert not (own * ~held).any()
        assert not (keep & ~held).any()
    assert int(sparsegpt(W * held, H, held=held, sparsity=0.5)[1].sum()) == 48


def view(family="bert"):
    delta = attach(tiny(family).double(), Full())
    data = [batch(family, size=4, seed=s, tokens=12) for s in range(4)]
    return View(delta, targets(delta, "base"), data)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_repairs_a_model(family):
    """Each map by the given mask, on the inputs behind the blocks that are repaired already."""
    seen, rule = view(family), SparseGPT()
    scores, before = rule.score(seen), {n: w.clone() for n, w in seen.weights.items()}
    masks = {n: s > s.median() for n, s in scores.items()}

    def turn(name, t):
        return t.T if seen.targets[name].transposed else t

    H, at_once = hessians(seen), SparseGPT(sequential=False)
    for name, s in scores.items():
        C = torch.linalg.cholesky(torch.linalg.inv(damped(H[name])), upper=True)
        torch.testing.assert_close(turn(name, s), turn(name, before[name]) ** 2 / C.diagonal() ** 2)
    at_once.repair(seen, masks)
    for name, w in seen.weights.items():
        torch.testing.assert_close(turn(name, w), sparsegpt(turn(name, before[name]), H[name],
                                                            mask=turn(name, masks[name]))[0])
    for name, t in seen.targets.items():
        t.parameter.data.copy_(before[name])
    rule.repair(seen, masks)
    first = [n for n, t in seen.targets.items() if t.sites[0].block == 0]
    later = hessians(seen)  # of block 0 as it was on the plain model, of block 1 as it was behind a repaired block 0
    for name, w in seen.weights.items():
        assert not w[~masks[name]].any()
        if name == list(seen.targets)[len(first)]:
            assert not torch.allclose(later[name], H[name])
            torch.testing.assert_close(turn(name, w), sparsegpt(turn(name, before[name]), later[name],
                                                                mask=turn(name, masks[name]))[0])


def test_solves_a_model():
    seen = view()
    before = {n: w.clone() for n, w in seen.weights.items()}
    with torch.no_grad():
        plain = [seen.model(**b).logits for b in seen.batches]

    def drift():
        with torch.no_grad():
            return sum((seen.model(**b).logits - y).square().sum() for b, y in zip(seen.batches, plain, strict=True))

    masks = SparseGPT().solve(seen, pattern=(2, 4))
    assert all(bool((m.view(-1, 4).sum(1) == 2).all()) for m in masks.values())
    seen.delta.set_masks(masks)
    own = drift()
    with torch.no_grad():
        for name, t in seen.targets.items():
            t.parameter.copy_(before[name] * torch.stack([without(r, 2) for r in before[name].abs().view(-1, 4)])
                              .view_as(before[name]))
    assert own < drift()


def test_refusals():
    W, _, H = problem()
    for given in ({}, {"sparsity": 0.5, "pattern": (2, 4)}):
        with pytest.raises(MethodError, match="one of"):
            sparsegpt(W, H, **given)
    with pytest.raises(MethodError, match="does not fit"):
        sparsegpt(W, H, pattern=(2, 5))
    with pytest.raises(MethodError, match="cannot be factored"):
        sparsegpt(W, -H, sparsity=0.5)
    delta = attach(tiny("bert"), LoRA(rank=2))
    with pytest.raises(MethodError, match="Full"):
        SparseGPT().score(View(delta, targets(delta, "base"), [batch("bert")]))
    seen = View(delta, targets(delta, "base"), [batch("bert")])
    before = {n: w.clone() for n, w in seen.weights.items()}
    masks = {n: s > s.median() for n, s in SparseGPT(update=False).score(seen).items()}
    SparseGPT(update=False).repair(seen, masks)
    assert all(torch.equal(before[n], w) for n, w in seen.weights.items())
