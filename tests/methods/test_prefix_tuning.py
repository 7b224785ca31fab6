"""Prefix tuning against its paper: softmax over the prefix's keys and the text's own, in plain torch."""
import pytest
import torch

import slimtune as st
from slimtune.testing import batch, doubled, output, randomize, tiny

PLACES = {  # attention module, query, key and value projections, the output projection, its scale
    "bert": ("bert.encoder.layer.1.attention.self", "{}.query", "{}.key", "{}.value",
             "bert.encoder.layer.1.attention.output.dense", 8**-0.5),
    "vit": ("vit.layers.1.attention", "{}.q_proj", "{}.k_proj", "{}.v_proj", "{}.o_proj", 8**-0.5),
    "bart": ("model.decoder.layers.1.encoder_attn", "{}.q_proj", "{}.k_proj", "{}.v_proj", "{}.out_proj", 8**-0.5),
    "t5 cross": ("decoder.block.1.layer.1.EncDecAttention", "{}.q", "{}.k", "{}.v", "{}.o", 1.0),
    "t5 self": ("encoder.block.1.layer.0.SelfAttention", "{}.q", "{}.k", "{}.v", "{}.o", 1.0),
}
SITES = {"bert": "encoder.1.attn", "vit": "vision.1.attn", "bart": "decoder.1.cross.attn",
         "t5 cross": "decoder.1.cross.attn", "t5 self": "encoder.1.attn"}


def heads(t):
    return t.unflatten(-1, (-1, 8)).transpose(-3, -2)


@pytest.mark.parametrize("place", sorted(SITES))
def test_equation(place: str):
    """Gradients too: the same softmax, written out, in the place of the attention's result."""
    family = place.split()[0]
    inputs = doubled(batch(family))
    model, seen = tiny(family).double(), {}
    delta = randomize(st.attach(model, st.methods.PrefixTuning(length=3)))
    attention, *paths, scale = PLACES[place]
    q, k, v, o = (path.format(attention) for path in paths)
    for key, path in zip("qkv", (q, k, v), strict=True):
        model.get_submodule(path).register_forward_hook(lambda m, a, out, key=key: seen.update({key: out.detach()}))
    model.get_submodule(o).register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    output(model, inputs)
    p = {n: dict(delta.named_parameters())[f"{SITES[place]}.prefix_tuning.{n}"] for n in ("key", "value")}
    scores = heads(seen["q"]) @ torch.cat([heads(p["key"]).expand(3, -1, -1, -1), heads(seen["k"])], 2).mT * scale
    if place == "t5 self":  # T5 adds a bias by relative position; a prefix has none
        scores[..., 3:] += model.encoder.block[0].layer[0].SelfAttention.compute_bias(7, 7).detach()
    if "attention_mask" in inputs:  # the text's padding stays closed, the prefix is open
        scores[..., 3:] += (1 - inputs["attention_mask"].double())[:, None, None] * -1e9
    wanted = scores.softmax(-1) @ torch.cat([heads(p["value"]).expand(3, -1, -1, -1), heads(seen["v"])], 2)
    wanted = wanted.transpose(1, 2).flatten(2)
    st.testing.assert_equation(seen["out"], wanted, p)


def test_it_is_a_gate_between_prefix_and_text():
    """He et al. 2022, equation 5: (1 - lambda) softmax(q k) v + lambda softmax(q P_k) P_v."""
    g = torch.Generator().manual_seed(0)
    q, k, v, pk, pv = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (5, 7, 7, 3, 3))
    joint = (q @ torch.cat([pk, k]).T).softmax(-1) @ torch.cat([pv, v])
    a, b = (q @ pk.T).exp().sum(-1, keepdim=True), (q @ k.T).exp().sum(-1, keepdim=True)
    gate = a / (a + b)
    torch.testing.assert_close(joint, (1 - gate) * (q @ k.T).softmax(-1) @ v + gate * (q @ pk.T).softmax(-1) @ pv)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_decoder_sees_the_prefix_as_a_cache_of_it(family: str):
    """transformers' own cache, filled with the prefix, at the text's positions from 0: the same logits."""
    from transformers import DynamicCache

    model, inputs = tiny(family).double(), batch(family, labels=False)
    delta = randomize(st.attach(model, st.methods.PrefixTuning(length=3)))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    cache = DynamicCache()
    for i in range(2):
        pair = (state[f"decoder.{i}.attn.prefix_tuning.{n}"] for n in ("key", "value"))
        cache.update(*(heads(t).expand(3, -1, -1, -1) for t in pair), i)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.long), inputs["attention_mask"]], 1)
    positions = torch.arange(7).expand(3, -1)
    out = model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(out.logits, own)


def test_the_reparametrisation_gives_the_flat_prefix_it_is_saved_as(tmp_path):
    model, inputs = tiny("t5"), batch("t5")
    delta = randomize(st.attach(model, st.methods.PrefixTuning(length=3, hidden=5)))
    own, p = output(model, inputs), {n.rpartition(".")[2]: t for n, t in delta.state().items()}
    h = torch.tanh(p["decoder_cross_embedding"] @ p["decoder_cross_down"].T + p["decoder_cross_down_bias"])
    key, value = (h @ p["decoder_cross_up_1"].T + p["decoder_cross_up_bias_1"]).chunk(2, -1)
    delta.save(tmp_path / "delta")
    other = tiny("t5")
    flat = st.load(other, tmp_path / "delta")
    torch.testing.assert_close(flat.state()["decoder.1.cross.attn.prefix_tuning.key"], key)
    torch.testing.assert_close(flat.state()["decoder.1.cross.attn.prefix_tuning.value"], value)
    assert torch.equal(output(other, inputs), own)
    assert flat.count().adapter == 6 * 2 * 3 * 32
