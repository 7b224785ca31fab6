"""Kept uses of a tensor against its gradients of each example, whole: norms, weighted sums, ties, and what leaks."""
import pytest
import torch
import transformers
from torch import nn

import slimtune as st
from slimtune.core.bookkeeping import Outer, Rows, Whole, keeping, keeps
from slimtune.core.examples import per_example
from slimtune.privacy.losses import example_losses as each_loss
from slimtune.testing import batch, doubled, tiny

B, T, P, D = 3, 5, 4, 6
FAMILIES = ("bert", "gpt2", "t5", "llama", "vit")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uses() -> dict[str, Outer | Whole]:
    rows = torch.randint(0, P, (B, T), generator=torch.Generator().manual_seed(3))
    return {"linear": Outer(drawn(B, T, P), drawn(B, T, D, seed=1)),
            "longer": Outer(drawn(B, 2, P, seed=4), drawn(B, 2, D, seed=5)),
            "lookup": Outer(rows, drawn(B, T, D, seed=2)), "whole": Whole(drawn(B, P, D, seed=6))}


def by_loop(use: Outer | Whole) -> torch.Tensor:
    """sum_t l_it r_it^T, term by term."""
    if isinstance(use, Whole):
        return use.grads
    made = torch.zeros(B, P, D, dtype=torch.float64)
    for i in range(B):
        for left, right in zip(use.left[i], use.right[i], strict=True):
            left = nn.functional.one_hot(left, P).double() if left.dim() == 0 else left
            made[i] += left[:, None] * right[None]
    return made


@pytest.mark.parametrize("names", [["linear"], ["lookup"], ["linear", "lookup"], ["linear", "longer", "lookup"],
                                   ["lookup", "lookup"], ["whole"], ["lookup", "whole"], ["whole", "linear"]])
def test_rows_are_what_a_loop_makes(names):
    """A tied tensor too: the norm of its uses' sum, cross terms included, without the sum."""
    kinds, factors = uses(), drawn(B, seed=9)
    wanted = torch.stack([by_loop(kinds[n]) for n in names]).sum(0)
    rows = Rows(torch.Size([P, D]), [kinds[n] for n in names])
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows.norms({}), wanted.flatten(1).norm(dim=1), **close)
    torch.testing.assert_close(rows.sum(factors), torch.einsum("b,bpd->pd", factors, wanted), **close)
    total = drawn(P, D, seed=8)
    torch.testing.assert_close(rows.sum(factors, total.clone()), total + torch.einsum("b,bpd->pd", factors, wanted),
                               **close)
    torch.testing.assert_close(rows.each(), wanted, **close)


def test_products_of_half_precision_are_not_taken_for_one_another():
    """Widened copies are freed and others lie where they lay: a product must not be found by that."""
    grams: dict = {}
    for seed in range(0, 8, 2):
        use = Outer(drawn(2, 8, 64, seed=seed).bfloat16(), drawn(2, 8, 64, seed=seed + 1).bfloat16())
        wanted = use.each(torch.Size([64, 64])).flatten(1).norm(dim=1)
        torch.testing.assert_close(Rows(torch.Size([64, 64]), [use]).norms(grams), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("names", [["linear"], ["lookup", "longer"], ["whole"], ["whole", "linear"]])
def test_what_does_not_live_has_no_gradient(names):
    kinds, factors, mask = uses(), drawn(B, seed=9), drawn(P, D, seed=7) > 0
    wanted = torch.stack([by_loop(kinds[n]) for n in names]).sum(0) * mask
    rows = Rows(torch.Size([P, D]), [kinds[n] for n in names], mask)
    torch.testing.assert_close(rows.norms({}), wanted.flatten(1).norm(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.sum(factors), torch.einsum("b,bpd->pd", factors, wanted), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.each(), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_has_the_norms_and_the_clipped_sum_of_a_loop(family):
    """To 1e-10, and no example's gradient of a large tensor is made: what is kept is activations."""
    model = tiny(family).double().eval()
    delta = st.attach(model, st.methods.Full())
    inputs = doubled(batch(family))
    with per_example(model) as grads:
        each_loss(model, inputs).sum().backward()
        rows = grads.take()
    assert all(p.grad is None for p in delta.parameters())
    grams: dict = {}
    norms = torch.stack([one.norms(grams) for one in rows.values()], 1).norm(dim=1)
    looped = [torch.autograd.grad(each_loss(model, {k: v[i:i + 1] for k, v in inputs.items()}).sum(),
                                  list(delta.parameters()), allow_unused=True) for i in range(len(norms))]
    wanted = torch.stack([torch.stack([g.norm() for g in one if g is not None]).norm() for one in looped])
    torch.testing.assert_close(norms, wanted, rtol=1e-10, atol=1e-12)
    factors = (0.5 * wanted.median() / wanted).clamp(max=1)
    for i, (name, _) in enumerate(delta.named_parameters()):
        parts = [f * one[i] for f, one in zip(factors, looped, strict=True) if one[i] is not None]
        torch.testing.assert_close(rows[name].sum(factors), torch.stack(parts).sum(0), rtol=1e-10, atol=1e-10)
    kept = [use for one in rows.values() for use in one.uses if isinstance(use, Outer)]
    assert kept, "nothing was kept as its factors"


def test_the_choice_is_by_size():
    """p d below 2 T^2: the gradient of each example is made at once; else its factors are kept."""
    for length, kind in ((3, Outer), (5, Whole)):                 # 6 x 8 = 48 against 18 and 50
        module, found = nn.Linear(8, 6).double(), {}
        run = keeping(module, dict(module.named_parameters()), 2, found.__setitem__)
        run(drawn(2, length, 8)).square().sum().backward()
        assert type(found["weight"]) is kind


def test_modules_with_rules_of_their_own_are_left_to_vmap():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not keeps(Doubled(2, 2))
    assert not keeps(nn.Embedding(3, 2, max_norm=1.0))
    assert not keeps(nn.Embedding(3, 2, scale_grad_by_freq=True))
    assert keeps(transformers.pytorch_utils.Conv1D(2, 2))
    model = tiny("bert").double().eval()
    model.classifier = Doubled(32, 3).double()
    delta = st.attach(model, st.methods.LinearProbe())
    inputs = batch("bert")
    with per_example(model) as grads:
        each_loss(model, inputs).sum().backward()
    found = grads.collect()
    for i in range(len(inputs["labels"])):
        one = torch.autograd.grad(each_loss(model, {k: v[i:i + 1] for k, v in inputs.items()}).sum(),
                                  list(delta.parameters()))
        for (name, _), grad in zip(delta.named_parameters(), one, strict=True):
            torch.testing.assert_close(found[name][i], grad)


def test_under_autocast_what_is_summed_is_what_was_measured():
    """Both in float32, of the same bfloat16 factors."""
    model, inputs = tiny("bert").eval(), batch("bert")
    st.attach(model, st.methods.Full())
    with per_example(model) as grads:
        with torch.autocast("cpu", torch.bfloat16):
            losses = each_loss(model, inputs)
        losses.sum().backward()
        rows = grads.take()
    for name, one in rows.items():
        whole = one.each()
        assert whole.dtype == torch.float32, name
        torch.testing.assert_close(one.norms({}), whole.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.sum(torch.ones(len(whole))), whole.sum(0), rtol=1e-4, atol=1e-6)
