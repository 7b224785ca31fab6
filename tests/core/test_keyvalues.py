"""Extra keys and values in their four compositions: the gate is the concatenation, "add" is it without the gate."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, loss, output, randomize, tiny

PrefixTuning = st.methods.PrefixTuning


def run(family: str, implementation: str, composition: str):
    model, inputs = tiny(family).double(), batch(family)
    model.set_attn_implementation(implementation)
    delta = randomize(st.attach(model, PrefixTuning(length=3, composition=composition)), std=1.0)
    return output(model, inputs), torch.autograd.grad(loss(model, inputs), list(delta.parameters()))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama", "bart"])
def test_the_gate_is_the_concatenation(family: str, implementation: str):
    """Outputs and gradients: under a padding mask, causal, with a relative bias, with grouped queries."""
    (out, grads), (out_2, grads_2) = (run(family, implementation, c) for c in ("concat", "gate"))
    exact = (family, implementation) != ("llama", "eager")  # whose softmax is in float32, whatever the model's dtype
    torch.testing.assert_close(out, out_2, atol=1e-12 if exact else 1e-6, rtol=0)
    torch.testing.assert_close(grads, grads_2, atol=1e-12 if exact else 1e-6, rtol=0)
    assert not torch.allclose(out, run(family, implementation, "add")[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_the_gate_it_is_added(implementation: str):
    """out_i + softmax(q_i P_k,i^T / sqrt(c)) P_v,i, head by head and query by query."""
    model, inputs, seen = tiny("gpt2").double(), batch("gpt2"), {}
    model.set_attn_implementation(implementation)
    delta = randomize(st.attach(model, PrefixTuning(length=3, composition="add", blocks=(1,))))
    attention = model.transformer.h[1].attn
    attention.c_attn.register_forward_hook(lambda m, a, y: seen.update(q=y[..., :32].detach()))
    attention.c_proj.register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    with delta.disabled():
        output(model, inputs)
    wanted = seen["h"].detach().clone()
    output(model, inputs)
    p = {n: dict(delta.named_parameters())[f"decoder.1.attn.prefix_tuning.{n}"] for n in ("key", "value")}
    added = torch.zeros_like(wanted)
    for i in range(4):
        own = slice(8 * i, 8 * i + 8)
        scores = [seen["q"][..., own] @ p["key"][j, own] / 8**0.5 for j in range(3)]
        total = sum(s.exp() for s in scores)
        added[..., own] += sum((s.exp() / total)[..., None] * p["value"][j, own] for j, s in enumerate(scores))
    assert_equation(seen["h"], wanted + added, p)


@pytest.mark.parametrize("composition", ["gate", "add"])
def test_a_cached_decoder_goes_on_as_a_whole_forward(composition: str):
    """The last token alone, behind a cache of those before it, gives the whole forward's last logits."""
    from transformers import DynamicCache

    model, ids = tiny("llama").double(), batch("llama")["input_ids"]
    randomize(st.attach(model, PrefixTuning(length=3, composition=composition)))
    cache = DynamicCache()
    model(ids[:, :4], past_key_values=cache, use_cache=True)
    step = model(ids[:, 4:5], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step[:, 0], model(ids[:, :5]).logits[:, -1])


def test_pairs_beside_take_no_positions():
    with pytest.raises(MethodError, match="positions='apart'"):
        st.attach(tiny("gpt2"), PrefixTuning(length=3, composition="gate", positions="before"))
    with pytest.raises(MethodError, match="composition"):
        PrefixTuning(composition="gated")
