"""The private step: clipped gradients by a loop, noise by its statistics, Opacus itself where it is right."""
import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from privacy_toys import BATCH, delta_of, ledger, loop, norm, part, plus, same, step_of, summed, texts

import slimtune as st
from slimtune.core.bookkeeping import Rows, Whole
from slimtune.errors import DeltaError, RecipeError
from slimtune.privacy.draws import rekey
from slimtune.privacy.losses import example_losses
from slimtune.testing import small, tiny

METHODS = ("lora", "ia3", "prompt_tuning", "prefix_tuning", "compacter", "bitfit", "lst")


@functools.cache
def tried(name: str):
    return delta_of("bert", small(st.methods.get(name)))


@settings(max_examples=15, deadline=None)
@given(name=some.sampled_from(METHODS), count=some.integers(1, 4), seed=some.integers(0, 9), out=some.integers(0, 3),
       clip=some.floats(1e-3, 10), clipping=some.sampled_from(["flat", "per_layer", "automatic", "adaptive"]))
def test_an_example_more_moves_the_clipped_sum_by_no_more_than_clip(name, count, seed, out, clip, clipping):
    delta, batch = tried(name), texts(count, seed)
    step = step_of(delta, ledger(clip=clip, clipping=clipping))
    rest = [i for i in range(count) if i != out % count]
    whole = summed(step, batch)
    left = summed(step, part(batch, rest)) if rest else {n: torch.zeros_like(g) for n, g in whole.items()}
    moved = {n: whole[n] - left[n] for n in whole}
    assert norm(moved) <= clip * (1 + 1e-9)
    one = loop(delta, part(batch, slice(out % count, out % count + 1)))[0]
    same(moved, {n: g * factor(clipping, clip, one, n) for n, g in one.items()}, rtol=1e-6, atol=1e-9)


def factor(clipping: str, clip: float, grads: dict[str, torch.Tensor], name: str) -> float:
    if clipping == "per_layer":
        return min(1.0, clip / math.sqrt(len(grads)) / (float(grads[name].norm()) + 1e-6))
    if clipping == "automatic":
        return clip / (norm(grads) + 0.01) * min(1.0, clip / (clip * norm(grads) / (norm(grads) + 0.01) + 1e-6))
    return min(1.0, clip / (norm(grads) + 1e-6))


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
def test_prompts_are_clipped_for_each_example(name):
    """Opacus alone sees one gradient of a prompt, the batch's, and clips that: 1 and not up to 4 times the clip."""
    delta, batch, clip = delta_of("gpt2", small(st.methods.get(name))), texts(4, classes=False), 1e-3
    each = loop(delta, batch)
    found = summed(step_of(delta, ledger(clip=clip)), batch)
    same(found, plus(each, [clip / (norm(g) + 1e-6) for g in each]))
    assert norm(found) > 1.5 * clip


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_how_many_run_at_once_changes_nothing(size, clipping):
    delta, batch = tried("lora"), texts(4)
    book = ledger(0.5, clip=0.01, clipping=clipping, **({"count_noise": 1.0} if clipping == "adaptive" else {}))
    step = step_of(delta, book)
    found = []
    for parts in ([batch], [part(batch, slice(i, i + size)) for i in range(0, 4, size)]):
        step.begin()
        step.clip = 0.01 if clipping != "per_layer" else step.clip
        for rows in parts:
            step.add(rows)
        step.finish(1)
        found.append({n: p.grad.clone() for n, p in step.named.items()} | {"clip": torch.tensor(step.clip)})
    same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [st.methods.LoRA(rank=2), st.methods.PrefixTuning(length=3), st.methods.BitFit()])
def test_gradient_checkpointing_changes_nothing(method, reentrant):
    delta, batch = delta_of("gpt2", method, dropout=False), texts(3, classes=False)
    delta.model.train()
    step = step_of(delta, ledger(clip=0.1))
    wanted = summed(step, batch)
    delta.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    delta.model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    same(summed(step, batch), wanted)
    assert len(calls) == 2, "the block ran again in the backward pass"


def test_without_noise_and_clip_it_is_the_plain_optimizer():
    plain, private = (delta_of("gpt2", st.methods.LoRA(rank=2)) for _ in range(2))
    batch = texts(BATCH, classes=False)
    step = step_of(private, ledger(0.0, clip=1e9), adamw := torch.optim.AdamW(private.parameters(), lr=1e-2))
    usual = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for number in range(1, 6):
        usual.zero_grad()
        example_losses(plain.model, batch).mean().backward()
        usual.step()
        step.begin()
        step.add(part(batch, slice(0, 3)))
        step.add(part(batch, slice(3, 4)))
        step.finish(number)
        adamw.step()
    same(dict(private.state()), dict(plain.state()), rtol=1e-9, atol=1e-11)
    assert step.ledger.steps == 5


@pytest.mark.parametrize(("clipping", "secure"), [("flat", False), ("flat", True), ("per_layer", False),
                                                  ("automatic", False), ("adaptive", False)])
def test_the_noise_has_its_variance_and_is_new_each_step(clipping, secure):
    """Without examples the gradient is noise over the expected number: sum of squares ~ chi square."""
    delta, sigma, clip = tried("lora"), 1.5, 0.3
    book = ledger(sigma, clip=clip, clipping=clipping, secure=secure,
                  **({"count_noise": 1.0} if clipping == "adaptive" else {}))
    step = step_of(delta, book)
    drawn = []
    for number in range(1, 5):
        step.begin()
        before = step.clip
        step.finish(number)
        drawn.append(torch.cat([p.grad.flatten() for p in step.named.values()]) * BATCH / before)
    noise, n = torch.stack(drawn), sum(d.numel() for d in drawn)
    wanted = (sigma ** -2 - 2.0 ** -2) ** -0.5 if clipping == "adaptive" else sigma
    chi = float((noise / wanted).square().sum())
    assert abs(chi - n) < 5 * math.sqrt(2 * n)
    assert abs(float(noise.mean())) < 5 * wanted / math.sqrt(n)
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(n / 4)
    assert book.steps == 4, "a step without examples is a step"


def test_a_step_taken_again_draws_the_same_noise():
    step = step_of(tried("lora"), ledger(1.0))
    found = []
    for number in (3, 4, 3):
        step.begin()
        step.finish(number)
        found.append(torch.cat([p.grad.flatten() for p in step.named.values()]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_adaptive_clip_follows_the_quantile():
    """Andrew et al., Algorithm 1: C exp(-eta (b - q)), b the share of the expected number that is not clipped."""
    delta, batch = tried("lora"), texts(4)
    norms = sorted(norm(g) for g in loop(delta, batch))
    clip = (norms[2] + norms[3]) / 2                        # three of four are not clipped
    book = ledger(0.0, clip=clip, clipping="adaptive", count_noise=1e-9, quantile=0.5, clip_rate=0.2)
    step = step_of(delta, book)
    for rows in ([[0, 1, 2, 3]], [[0], [1, 2], [3]], []):
        step.begin()
        step.clip = clip
        for some_rows in rows:
            step.add(part(batch, some_rows))
        step.finish(1)
        share = 0.75 if rows else 0.5                       # 1/2 + sum (b_i - 1/2) / 4
        assert step.clip == pytest.approx(clip * math.exp(-0.2 * (share - 0.5)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_it_is_opacus_where_opacus_is_right():
    """A linear head: GradSampleModule's gradients, and its optimizer's step with the same noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    delta, batch = delta_of("bert", st.methods.LinearProbe()), texts(4)
    twin = copy.deepcopy(delta.model).train()               # Opacus' hooks sleep in eval mode
    theirs = GradSampleModule(twin, loss_reduction="sum")
    values = [p for p in theirs.parameters() if p.requires_grad]
    generator = torch.Generator()
    wrapped = DPOptimizer(torch.optim.SGD(values, lr=1.0), noise_multiplier=0.7, max_grad_norm=0.05,
                          expected_batch_size=BATCH, generator=generator)
    logits = theirs(**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").backward()
    step = step_of(delta, ledger(0.7, clip=0.05))
    rekey(generator, step.secret, "noise of step 1")
    wrapped.step()
    step.begin()
    step.add(batch)
    step.finish(1)
    assert len(values) == len(step.named)
    for p, other in zip(step.named.values(), values, strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_a_penalty_is_added_behind_the_noise(monkeypatch):
    delta = tried("lora")
    step = step_of(delta, ledger(1.0))
    first, second = list(delta.parameters())[:2]
    found = []
    for extra in (lambda: None, lambda: (first ** 2).sum()):
        monkeypatch.setattr(delta, "penalty", extra)
        step.begin()
        step.finish(1)
        found.append((first.grad.clone(), second.grad.clone()))
    torch.testing.assert_close(found[1][0] - found[0][0], 2 * first.detach())
    assert torch.equal(found[0][1], found[1][1])


def test_a_tensor_without_a_gradient_for_each_example_is_an_error():
    delta = tried("lora")
    step = step_of(delta)

    def rows(size, names):
        return {n: Rows(p.shape, [Whole(p.new_zeros(size, *p.shape))])
                for n, p in delta.named_parameters() if n in names}

    first, *rest = (n for n, _ in delta.named_parameters())
    for bad in (rows(2, rest), rows(2, rest) | rows(1, [first])):
        with pytest.raises(DeltaError, match=first):
            step.take(bad, 2)
    with pytest.raises(DeltaError, match="exactly what the delta trains"):
        step_of(delta, optimizer=torch.optim.SGD(list(delta.parameters())[1:], lr=1.0))
    other = st.attach(delta.model, st.methods.BitFit(), name="other")
    try:
        with pytest.raises(DeltaError):
            step.add(texts(2))
    finally:
        other.detach()
        delta.activate()


def test_it_takes_one_forward_and_one_backward_pass(monkeypatch):
    delta, calls = delta_of("gpt2", st.methods.Full()), []
    real = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (calls.append("backward"), real(*a, **k))[1])
    delta.model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append("forward"))
    step_of(delta, ledger(1.0)).add(texts(3, classes=False))
    assert calls == ["forward", "backward"]


def test_a_tensor_that_is_read_past_its_module_is_an_error():
    """Such a use has one gradient for the batch, which nothing clips."""
    delta = delta_of("bert", st.methods.Full())
    word = delta.model.bert.embeddings.word_embeddings
    delta.model.classifier.register_forward_hook(lambda m, a, y: y + 1e-3 * word.weight.sum())
    with pytest.raises(DeltaError, match="beside those of its examples"):
        step_of(delta).add(texts(3))


def test_weight_decay_is_outside_of_what_is_clipped_and_noised():
    """A step without examples and noise only decays."""
    delta = delta_of("bert", st.methods.LoRA(rank=2))
    before = {n: p.detach().clone() for n, p in delta.named_parameters()}
    adamw = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    step = step_of(delta, ledger(0.0, clip=1e-6), adamw)
    step.begin()
    step.finish(1)
    adamw.step()
    same(dict(delta.named_parameters()), {n: 0.95 * p for n, p in before.items()})


def test_a_count_that_is_too_exact_for_sigma_is_refused():
    with pytest.raises(RecipeError, match=r"privacy.count_noise: 0.2 must be above"):
        step_of(tried("lora"), ledger(1.0, clipping="adaptive"))


@pytest.mark.parametrize("name", st.methods.names())
def test_every_method_has_a_clipped_sum_of_its_examples(name):
    batch, clip = texts(3), 0.05
    try:
        delta = delta_of("bert", small(st.methods.get(name)))
    except st.SlimtuneError as error:
        pytest.skip(error.what)
    each = loop(delta, batch)
    found = summed(step_of(delta, ledger(clip=clip)), part(batch, slice(0, 2)), part(batch, slice(2, 3)))
    same(found, plus(each, [min(1.0, clip / (norm(g) + 1e-6)) for g in each]))
    assert norm(found) > 0


def test_what_a_mask_holds_at_0_takes_no_share_of_the_clip_and_no_noise():
    """The clipped sum is that of m * g_i; without a mask in the norm it would be shorter."""
    delta, batch, clip = delta_of("bert", st.methods.Full(), dropout=False), texts(4), 1e-3
    names = [n for n, p in delta.named_parameters() if p.dim() == 2]
    masks = {n: torch.rand(delta.tensors()[n].shape, generator=torch.Generator().manual_seed(i)) > 0.7
             for i, n in enumerate(names)}
    delta.set_masks(masks)
    each = [{n: g * masks[n] if n in masks else g for n, g in one.items()} for one in loop(delta, batch)]
    step = step_of(delta, ledger(clip=clip))
    same(summed(step, batch), plus(each, [clip / (norm(g) + 1e-6) for g in each]))
    noisy = step_of(delta, ledger(sigma=1.0, clip=clip))
    noisy.add(batch)
    noisy.finish(1)
    assert all(not p.grad[~masks[n]].any() and bool(p.grad[masks[n]].all())
               for n, p in noisy.named.items() if n in masks)


def test_under_autocast_no_example_is_more_than_its_clip():
    """Norms of what bfloat16 computes, from products that several tensors could be taken to share."""
    delta = st.attach(tiny("bert", hidden_size=64, intermediate_size=128), st.methods.Full())
    batch, clip = texts(4), 1e-2
    for i in range(4):
        step = step_of(delta, ledger(clip=clip))
        step.add(part(batch, slice(i, i + 1)), lambda: torch.autocast("cpu", torch.bfloat16))
        assert norm({n: p.summed_grad for n, p in step.named.items()}) == pytest.approx(clip, rel=1e-3)
