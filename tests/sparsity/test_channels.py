"""Scores of channels against slow sums over each layer's own output, and refill by them."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.channels import channel_scores
from slimtune.sparsity.prune import prune
from slimtune.sparsity.refill import refill, refill_delta
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, tiny

M = st.methods
BY = ("features_l1", "features_l2", "saliency")


def data(family, count=3, padded=True):
    """Batches of two examples, of one of which the last tokens are padding."""
    found = []
    for seed in range(count):
        one = {k: v.clone() for k, v in batch(family).items()}
        if "input_ids" in one:
            draw = torch.Generator().manual_seed(seed)
            one["input_ids"] = torch.randint(5, 90, one["input_ids"].shape, generator=draw)
            if padded:
                one["attention_mask"] = torch.ones_like(one["input_ids"])
                one["attention_mask"][0, -3:] = 0
        found.append(one)
    return found


def slow(model, module, batches, by):
    """One example at a time: its output, and the gradient of its own loss by that output."""
    rows = []
    for b in batches:
        for i in range(b["input_ids"].shape[0]):
            one = {k: v[i:i + 1] for k, v in b.items()}
            kept = []
            handle = module.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y))
            loss = model(**one).loss
            handle.remove()
            g, = torch.autograd.grad(loss, kept)
            for t in range(kept[0].shape[1]):
                if one.get("attention_mask", torch.ones(1, 99))[0, t]:
                    a = kept[0][0, t]
                    rows.append([float(x) for x in (a * g[0, t] if by == "saliency" else a).detach()])
    d = len(rows[0])
    if by == "features_l2":
        return [(sum(r[j] ** 2 for r in rows) / len(rows)) ** 0.5 for j in range(d)]
    return [sum(abs(r[j]) for r in rows) / len(rows) for j in range(d)]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("by", BY)
def test_each_layer_is_scored_by_its_own_output(family, by):
    model = tiny(family).double()
    delta = st.attach(model, M.Full())
    prune(delta, 0.5, on="base")
    batches = data(family) if family == "bert" else data(family, padded=False)
    if family == "gpt2":  # the mean over tokens of a language model's loss: alike for examples of one length
        batches = [{**b, "labels": b["input_ids"]} for b in batches]
    chosen = targets(delta, "base", sites=("attn.o", "mlp.up", "mlp.down"))
    found = channel_scores(View(delta, chosen, batches), by)
    for name, target in chosen.items():
        want = torch.tensor(slow(model, model.get_submodule(target.module), batches, by), dtype=torch.double)
        torch.testing.assert_close(found[name], want, msg=lambda m, name=name: f"{name}: {m}")
    assert not any(p.grad is not None for p in model.parameters())


def test_batches_do_not_matter():
    """Of the same examples in other batches the scores are the same."""
    delta = st.attach(tiny("bert").double(), M.Full())
    chosen, batches = targets(delta, "base"), data("bert")
    singles = [{k: v[i:i + 1] for k, v in b.items()} for b in batches for i in range(len(b["input_ids"]))]
    for by in BY:
        a, b = (channel_scores(View(delta, chosen, given), by) for given in (batches, singles))
        for name, score in a.items():
            torch.testing.assert_close(score, b[name])


def test_images_and_pairs_of_towers():
    for family in ("vit", "t5"):
        delta = st.attach(tiny(family), M.BitFit() if family == "vit" else M.Full())
        chosen = targets(delta, "base")
        for by in BY:
            found = channel_scores(View(delta, chosen, [batch(family)]), by)
            for name, target in chosen.items():
                assert found[name].shape == (sum(s.d_out for s in target.sites),)
                assert found[name].isfinite().all()
                assert found[name].sum() > 0


def test_an_output_that_the_model_goes_on_with_in_place():
    """LoRA adds into the map's own output; what counts is what comes of it, and its gradient."""
    model = tiny("bert").double()
    delta = st.attach(model, M.LoRA(rank=2))
    for n, p in delta.named_parameters():
        if n.endswith(".B"):
            torch.nn.init.normal_(p)
    batches, chosen = data("bert"), targets(delta, "base", sites=("attn.q", "attn.v"))
    found = channel_scores(View(delta, chosen, batches), "saliency")
    for name, target in chosen.items():
        want = torch.tensor(slow(model, model.get_submodule(target.module), batches, "saliency"), dtype=torch.double)
        torch.testing.assert_close(found[name], want)
    assert not any(t.parameter.requires_grad for t in chosen.values())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("by", BY)
def test_refill_by_features(family, by):
    delta = st.attach(tiny(family), M.Full())
    prune(delta, 0.6, on="base")
    batches = data(family)
    if family == "gpt2":
        batches = [{**b, "labels": b["input_ids"]} for b in batches]
    before = dict(delta.masks)
    masks = refill_delta(delta, by=by, batches=batches)
    chosen = targets(delta, "base")
    scores = channel_scores(View(delta, chosen, batches), by)
    for name, target in chosen.items():
        new, old = (m.mT if target.transposed else m for m in (masks[name], before[name]))
        k = int(old.sum()) // old.shape[1]
        best = sorted(range(len(new)), key=lambda i, s=scores[name]: (float(s[i]), i))[len(new) - k:]
        assert new[:, 0].nonzero().flatten().tolist() == sorted(best)
        assert torch.equal(new, new[:, :1].expand_as(new))


def test_what_cannot_be_says_why():
    delta = st.attach(tiny("bert"), M.Full())
    prune(delta, 0.5, on="base")
    with pytest.raises(MethodError, match="Did you mean 'saliency'"):
        refill_delta(delta, by="salience", batches=data("bert"))
    with pytest.raises(MethodError, match="got none"):
        refill_delta(delta, by="saliency")
    with pytest.raises(MethodError, match="without data"):
        refill(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2), by="saliency")
    with pytest.raises(MethodError, match="There are: features_l1"):
        channel_scores(View(delta, targets(delta, "base"), data("bert")), "magnitude")
    added = st.attach(tiny("bert"), M.LoRA(rank=2))
    with pytest.raises(MethodError, match="no linear map of the backbone"):
        channel_scores(View(added, targets(added), data("bert")), "features_l1")
