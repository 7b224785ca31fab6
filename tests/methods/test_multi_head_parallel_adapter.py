"""The multi-head parallel adapter against its paper: head_i + s ReLU(q_i P_k,i^T) P_v,i."""
import pytest
import torch

import slimtune as st
from slimtune.testing import assert_equation, batch, output, randomize, tiny

MHPA = st.methods.MultiHeadParallelAdapter
PLACES = {  # site, query projection, output projection, scale of the query
    "bert": ("encoder.1.attn", "bert.encoder.layer.1.attention.self.query",
             "bert.encoder.layer.1.attention.output.dense", 8**-0.5),
    "bart": ("decoder.1.cross.attn", "model.decoder.layers.1.encoder_attn.q_proj",
             "model.decoder.layers.1.encoder_attn.out_proj", 8**-0.5),
    "t5": ("decoder.1.attn", "decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.o", 1.0)}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(PLACES))
def test_equation(family: str, implementation: str):
    """By a loop over heads; what is added is what enters the output projection with it, less without it."""
    site, query, out, scale = PLACES[family]
    model, inputs, seen = tiny(family).double(), batch(family), {}
    model.set_attn_implementation(implementation)
    method = MHPA(bottleneck=3, scale=2.0, blocks=(1,), sites=(site.replace(".1.", "."),))
    delta = randomize(st.attach(model, method))
    model.get_submodule(query).register_forward_hook(lambda m, a, y: seen.update(q=y.detach()))
    model.get_submodule(out).register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    with delta.disabled():
        output(model, inputs)
    plain = seen["h"].detach()
    output(model, inputs)
    p = {n: dict(delta.named_parameters())[f"{site}.multi_head_parallel_adapter.{n}"] for n in ("key", "value")}
    wanted = []
    for i in range(4):
        own = slice(8 * i, 8 * i + 8)
        h = torch.relu(scale * seen["q"][..., own] @ p["key"][:, own].T)
        wanted.append(plain[..., own] + 2.0 * h @ p["value"][:, own])
    assert_equation(seen["h"], torch.cat(wanted, -1), p)


def test_with_grouped_queries_the_heads_of_a_group_share_their_pairs():
    """Llama: four query heads, two pairs of keys and values; the query is the rotated one."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, inputs, seen = tiny("llama").double(), batch("llama"), {}
    delta = randomize(st.attach(model, MHPA(bottleneck=3, blocks=(0,))))
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda m, a, y: seen.update(q=y.detach()))
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(h=a[0].detach()))
    with delta.disabled():
        output(model, inputs)
    plain = seen["h"]
    output(model, inputs)
    q = seen["q"].unflatten(-1, (4, 8)).transpose(1, 2)
    q, _ = apply_rotary_pos_emb(q, q, *model.model.rotary_emb(seen["q"], torch.arange(7)[None]))
    key, value = (delta.state()[f"decoder.0.attn.multi_head_parallel_adapter.{n}"] for n in ("key", "value"))
    for i in range(4):
        pair, own = slice(8 * (i // 2), 8 * (i // 2) + 8), slice(8 * i, 8 * i + 8)
        wanted = plain[..., own] + torch.relu(q[:, i] @ key[:, pair].T / 8**0.5) @ value[:, pair]
        torch.testing.assert_close(seen["h"][..., own], wanted)


def test_it_counts_as_a_parallel_adapter_without_biases():
    own = st.attach(tiny("bart"), MHPA(bottleneck=3)).count().adapter
    other = st.attach(tiny("bart"), st.methods.ParallelAdapter(bottleneck=3, sites=("attn",)))
    biases = sum(p.numel() for n, p in other.named_parameters() if n.endswith("_bias"))
    assert own == other.count().adapter - biases == 6 * 2 * 3 * 32


def test_the_start():
    model, inputs = tiny("gpt2"), batch("gpt2")
    before = output(model, inputs)
    delta = st.attach(model, MHPA(bottleneck=3))
    assert torch.equal(output(model, inputs), before)
    delta.detach()
    state = st.attach(model, MHPA(bottleneck=64, init="bert")).state()
    assert 0.018 < state["decoder.0.attn.multi_head_parallel_adapter.value"].std() < 0.022
