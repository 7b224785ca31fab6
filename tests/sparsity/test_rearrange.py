"""Rearranged masks against the published pass in plain loops, and brute force."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.gradients import singles
from slimtune.sparsity.prune import prune
from slimtune.sparsity.rearrange import rearrange, swapped
from slimtune.testing import batch, tiny

M = st.methods


def cost(mask, g):
    """(1 - m)^T F (1 - m) = |sum of the gradients of what is pruned|^2."""
    return float(g[~mask].sum(0).square().sum())


def published(mask, g):
    """Greedy over vectors of gradients (units, examples): add i to what is pruned, take the best out."""
    order = sorted(range(len(g)), key=lambda i: (float(g[i].square().sum()), i))
    gone = [i for i in order if not mask[i]]
    for i in [i for i in order if mask[i]]:
        gone.append(i)
        total = g[gone].sum(0)
        left = [float((total - g[j]).square().sum()) for j in gone]
        best = min(left)
        gone.remove(i if left[-1] <= best * (1 + 1e-12) else gone[left.index(best)])
    return torch.tensor([i not in gone for i in range(len(g))])


@settings(deadline=None, max_examples=60)
@given(some.integers(0, 9999), some.integers(2, 24), some.integers(1, 8), some.floats(0, 1))
def test_the_published_pass(seed, units, examples, share):
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(units, examples, generator=draw, dtype=torch.double)
    mask = torch.rand(units, generator=draw) < share
    new = swapped(mask, g @ g.mT)
    assert torch.equal(new, published(mask, g))
    assert int(new.sum()) == int(mask.sum())
    assert cost(new, g) <= cost(mask, g) + 1e-9


def test_two_that_make_up_for_each_other_go_together():
    """By the diagonal, 0 and 2 are the cheapest; together 0 and 1 cost nothing, and brute force says the same."""
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0], [4.0, 4.0], [5.0, 1.0]], dtype=torch.double)
    mask = torch.tensor([False, True, False, True, True])
    new = swapped(mask, g @ g.mT)
    best = min(itertools.combinations(range(5), 2), key=lambda gone: cost(
        torch.tensor([i not in gone for i in range(5)]), g))
    assert new.tolist() == [i not in best for i in range(5)] == [False, False, True, True, True]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("per", ["example", "batch"])
def test_gates(family, per):
    model = tiny(family).double()
    delta = st.attach(model, M.Gates())
    given_ = [batch(family)]
    prune(delta, 0.5, "fisher", on="gates", batches=given_)
    before = dict(delta.masks)
    gates = delta.tensors()
    # the gradients of the whole network, by hand
    other = st.attach(tiny(family).double(), M.Gates())
    seen = []
    for one in [b for b in given_ for b in (singles(b) if per == "example" else [b])]:
        out = other.model.eval()(**one).loss
        seen.append(torch.autograd.grad(out, [other.tensors()[n] for n in before]))
    swaps = rearrange(delta, given_, per=per)
    for i, (name, mask) in enumerate(before.items()):
        g = torch.stack([grads[i] for grads in seen], 1)
        assert torch.equal(delta.masks[name], published(mask, g)), name
        assert torch.equal(gates[name].detach(), delta.masks[name].double())
        assert swaps[name] == int((delta.masks[name] & ~mask).sum())
        assert cost(delta.masks[name], g) <= cost(mask, g) + 1e-12
    assert delta.info["sparsity"][-1]["rearranged"] == sum(swaps.values())
    assert sum(int(m.sum()) for m in delta.masks.values()) == delta.info["sparsity"][-1]["kept"]
    if family == "bert":
        assert sum(swaps.values()) > 0
    assert not any(p.grad is not None for p in model.parameters())


def test_what_cannot_be_says_why():
    delta = st.attach(tiny("bert"), M.Gates())
    with pytest.raises(MethodError, match="is not pruned"):
        rearrange(delta, [batch("bert")])
    prune(delta, 0.5, "random", on="gates")
    with pytest.raises(MethodError, match="got none"):
        rearrange(delta, [])
    masks, values = dict(delta.masks), {n: p.detach().clone() for n, p in delta.tensors().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        rearrange(delta, [batch("bert")], loss=lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert all(torch.equal(delta.tensors()[n], v) for n, v in values.items())
    assert all(torch.equal(delta.masks[n], m) for n, m in masks.items())
    with torch.no_grad():
        next(p for n, p in delta.tensors().items() if n in masks).mul_(0.5)
    with pytest.raises(MethodError, match="between prune"):
        rearrange(delta, [batch("bert")])
    with pytest.raises(MethodError, match=r"Attach Gates\(\) first"):
        rearrange(st.attach(tiny("bert"), M.LoRA()), [batch("bert")])
