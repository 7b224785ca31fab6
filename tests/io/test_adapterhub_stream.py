"""Adapters on the residual stream against their equations, and in whole blocks of plain torch."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.io.adapterhub_stream import StreamAdapter, StreamCompacter
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny


def f(p, u):
    return F.relu(u @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def phm(p, u):
    down, up = (sum(torch.kron(a, s @ t) for a, s, t in zip(p["A"], p[f"{name}_s"], p[f"{name}_t"], strict=True))
                for name in ("down", "up"))
    return F.gelu(u @ down + p["down_bias"], approximate="tanh") @ up + p["up_bias"]


@pytest.mark.parametrize(("family", "site", "norm", "method", "g"), [
    ("bert", "encoder.1.norm.attn", "bert.encoder.layer.1.attention.output.LayerNorm", StreamAdapter, f),
    ("bart", "decoder.0.norm.cross", "model.decoder.layers.0.encoder_attn_layer_norm", StreamAdapter, f),
    ("bert", "encoder.0.norm.attn", "bert.encoder.layer.0.attention.output.LayerNorm", StreamCompacter, phm)])
def test_behind_a_post_norm(family, site, norm, method, g):
    model = tiny(family).double()
    delta = st.attach(model, method(bottleneck=8, sites=("attn", "mlp"), norms="none"))
    ln = model.get_submodule(norm)
    p, z, u, out = site_io(delta, site)
    assert_equation(out, F.layer_norm(g(p, u) + z, (32,), ln.weight, ln.bias, ln.eps), p)


@pytest.mark.parametrize(("family", "site", "norm"), [
    ("gpt2", "decoder.1.attn", "transformer.h.1.ln_1"), ("gpt2", "decoder.0.mlp", "transformer.h.0.ln_2"),
    ("t5", "decoder.1.cross.attn", "decoder.block.1.layer.1.layer_norm"),
    ("vit", "vision.1.mlp", "vit.layers.1.layernorm_after")])
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_in_a_pre_norm_block_it_reads_in_front_of_the_norm(family, site, norm, form):
    model = tiny(family).double()
    delta = st.attach(model, StreamAdapter(bottleneck=5, form=form, sites=("attn", "mlp")))
    seen = []
    hook = model.get_submodule(norm).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    p, r, h, out = site_io(delta, site)
    hook.remove()
    assert torch.equal(r, seen[-1])
    assert_equation(out, h + f(p, r if form == "parallel" else r + h), p)


def test_whole_blocks_of_gpt2():
    """h <- h + f(r + h) behind both sub-layers is r <- (r + h) + f(r + h): the adapter on the stream itself."""
    model, inputs = tiny("gpt2").double(), batch("gpt2")
    delta = randomize(st.attach(model, StreamAdapter(bottleneck=5, sites=("attn", "mlp"), head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()

    def forward(block, i):
        p = [{n: state[f"decoder.{i}.{role}.stream_adapter.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
             for role in ("attn", "mlp")]

        def run(r, *args, **kwargs):
            kwargs.pop("use_cache", None)
            r = r + block.attn(block.ln_1(r), *args, **kwargs)[0]
            r = r + f(p[0], r)
            r = r + block.mlp(block.ln_2(r))
            return r + f(p[1], r)
        return run

    for i, block in enumerate(model.transformer.h):
        block.forward = forward(block, i)
    torch.testing.assert_close(output(model, inputs), own)


def test_beside_a_post_norm_sub_layer_it_is_the_parallel_adapter():
    model = tiny("bert")
    logits = []
    for method in (StreamAdapter(bottleneck=3, form="parallel"), st.methods.ParallelAdapter(bottleneck=3)):
        delta = randomize(st.attach(model, method))
        logits.append(output(model, batch("bert")))
        delta.detach()
    assert torch.equal(*logits)


@pytest.mark.parametrize(("family", "site"), [("bert", "attn.q"), ("bert", "norm.mlp"), ("swin", "attn")])
def test_sites_without_such_a_norm(family, site):
    with pytest.raises(MethodError, match=rf"StreamAdapter cannot go on \w+\.0\.{site}"):
        st.attach(tiny(family), StreamAdapter(sites=(site,)))
