"""P-tuning v2 against its paper: a flat prefix in every attention, with dropout on the prefix in training."""
import pytest
import torch

import slimtune as st
from slimtune.testing import assert_equation, batch, output, randomize, tiny


def heads(t):
    return t.unflatten(-1, (-1, 8)).transpose(-3, -2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equation(implementation: str):
    model, inputs, seen = tiny("bert").double(), batch("bert"), {}
    model.set_attn_implementation(implementation)
    delta = randomize(st.attach(model, st.methods.PTuningV2(length=3)))
    attention = model.bert.encoder.layer[0].attention
    for key in ("query", "key", "value"):
        getattr(attention.self, key).register_forward_hook(lambda m, a, out, key=key: seen.update({key: out.detach()}))
    attention.output.dense.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    output(model, inputs)
    p = {n: dict(delta.named_parameters())[f"encoder.0.attn.p_tuning_v2.{n}"] for n in ("key", "value")}
    k, v = (torch.cat([heads(p[n]).expand(3, -1, -1, -1), heads(seen[n])], 2) for n in ("key", "value"))
    scores = heads(seen["query"]) @ k.mT / 8**0.5
    scores[..., 3:] += (1 - inputs["attention_mask"].double())[:, None, None] * -1e9
    assert_equation(seen["out"], (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), p)


def test_it_is_prefix_tuning_but_for_start_and_dropout():
    outs = []
    for method in (st.methods.PTuningV2(length=3), st.methods.PrefixTuning(length=3)):
        model = tiny("gpt2")
        randomize(st.attach(model, method))
        outs.append(output(model, batch("gpt2")))
    assert torch.equal(*outs)


def test_the_prefix_is_dropped_out_in_training_only():
    model, inputs = tiny("bert"), batch("bert")
    delta = st.attach(model, st.methods.PTuningV2(length=200, dropout=0.5))
    bound = delta.slots[0][1].bind(torch.zeros(1))
    key, _ = st.methods.PTuningV2(length=200, dropout=0.5).keys_values(bound)
    assert torch.equal(key, bound["key"])
    bound.training = True
    key, value = st.methods.PTuningV2(length=200, dropout=0.5).keys_values(bound)
    for found, whole in ((key, bound["key"]), (value, bound["value"])):
        assert 0.45 < (found == 0).double().mean() < 0.55
        torch.testing.assert_close(found[found != 0], 2 * whole[found != 0])
    assert not torch.equal(output(model.train(), inputs), output(model, inputs))
    assert torch.equal(output(model.eval(), inputs), output(model, inputs))


def test_the_start_is_an_embeddings():
    state = st.attach(tiny("bert"), st.methods.PTuningV2(length=100)).state()
    assert 0.95 < state["encoder.0.attn.p_tuning_v2.key"].std() < 1.05
    assert set(state) == {f"encoder.{i}.attn.p_tuning_v2.{n}" for i in (0, 1) for n in ("key", "value")} | {
        "head.classifier.weight", "head.classifier.bias"}
