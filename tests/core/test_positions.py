import copy
import warnings

import pytest
import torch

import slimtune
from slimtune.errors import MethodError
from slimtune.methods import PrefixTuning
from slimtune.testing import batch, loss, output, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SITES = ("decoder.self.attn",)


def attached(family, **method):
    model = tiny(family)
    delta = slimtune.attach(model, PrefixTuning(length=4, sites=SITES, positions="before", **method))
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    return model, delta


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_prefix_before_is_a_cache(family):
    """The oracle is transformers' own cache, filled with the prefix."""
    from transformers import DynamicCache, EncoderDecoderCache

    model, delta = attached(family)
    inputs = batch(family, labels=family in ("t5", "bart"))
    state = delta.state()
    pairs = [tuple(state[f"decoder.{i}.attn.prefix_tuning.{n}"].view(4, -1, 8).transpose(0, 1).expand(3, -1, -1, -1)
                   for n in ("key", "value")) for i in range(2)]
    cache = DynamicCache(pairs)
    if family in ("t5", "bart"):
        cache = EncoderDecoderCache(cache, DynamicCache())
    else:
        inputs["attention_mask"] = torch.cat([torch.ones(3, 4, dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = output(model, batch(family, labels=family in ("t5", "bart")))
        want = output(tiny(family), {**inputs, "past_key_values": cache})
        apart = tiny(family)
        slimtune.attach(apart, PrefixTuning(length=4, sites=SITES), state=state)
        assert not torch.allclose(output(apart, batch(family, labels=family in ("t5", "bart"))), want, atol=1e-3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_counts_on_behind_the_prefix(family, tmp_path):
    """The oracle is peft's forward, run anew for every token; its own generate is off on transformers 5.24."""
    from slimtune.io.peft import save_peft

    model, delta = attached(family)
    save_peft(delta, tmp_path)
    ids = batch(family)["input_ids"][:1, :5]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, told = peft.PeftModel.from_pretrained(tiny(family), tmp_path).eval(), ids
        for _ in range(6):
            last = theirs(input_ids=told, attention_mask=torch.ones_like(told)).logits[:, -1:]
            told = torch.cat([told, last.argmax(-1)], 1)
        ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                              pad_token_id=1, eos_token_id=None)
    assert torch.equal(ours, told)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_copies_run_alike_and_nothing_stays_behind(family):
    model, delta = attached(family, hidden=6)
    inputs = batch(family)
    with torch.no_grad():
        want = output(model, inputs)
        assert torch.equal(output(copy.deepcopy(model), inputs), want)
        with delta.disabled():
            assert torch.equal(output(model, inputs), output(tiny(family), inputs))
    loss(model, inputs).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in delta.named_parameters() if "bias" not in n)
    delta.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("slimtune" in name for name, _ in model.named_modules())


def test_the_reparametrisation_is_dropped_when_saved(tmp_path):
    model, delta = attached("gpt2", hidden=6)
    delta.save(tmp_path / "delta")
    other = tiny("gpt2")
    slimtune.load(other, tmp_path / "delta")
    with torch.no_grad():
        torch.testing.assert_close(output(other, batch("gpt2")), output(model, batch("gpt2")), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_towers_whose_positions_are_not_known_are_refused(family):
    with pytest.raises(MethodError, match="positions='apart'"):
        slimtune.attach(tiny(family), PrefixTuning(length=4, positions="before"))
