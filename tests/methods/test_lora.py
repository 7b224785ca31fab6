"""LoRA against its paper: y + (alpha / r) (x A^T) B^T, also in the slices of a fused projection."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn.q"), ("gpt2", "decoder.0.attn.v"), ("t5", "decoder.1.cross.attn.q"),
    ("llama", "decoder.1.attn.v"), ("vit", "vision.0.attn.q")])
def test_equation(family: str, site: str):
    delta = st.attach(tiny(family).double(), st.methods.LoRA(rank=3, alpha=6.0))
    p, x, y, out = site_io(delta, site)
    assert_equation(out, y + 2.0 * (x @ p["A"].T) @ p["B"].T, p)


def test_rslora_divides_by_the_root_of_the_rank():
    delta = st.attach(tiny("bert").double(), st.methods.LoRA(rank=4, alpha=6.0, rslora=True))
    p, x, y, out = site_io(delta, "encoder.0.attn.v")
    assert_equation(out, y + 3.0 * (x @ p["A"].T) @ p["B"].T, p)


def test_it_is_a_change_of_the_weights():
    model, inputs = tiny("gpt2").double(), batch("gpt2")
    delta = randomize(st.attach(model, st.methods.LoRA(rank=3, alpha=6.0)))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):  # c_attn is (in, 3 out): queries, keys, values
            for start, role in ((0, "q"), (64, "v")):
                A, B = (state[f"decoder.{i}.attn.{role}.lora.{n}"] for n in "AB")
                block.attn.c_attn.weight[:, start:start + 32] += 2.0 * (B @ A).T
    torch.testing.assert_close(output(model, inputs), own)


def test_count():
    count = st.attach(tiny("bert"), st.methods.LoRA(rank=3)).count()
    assert count.adapter == 2 * 2 * 3 * (32 + 32)


def test_a_sub_layer_site_is_not_merged():
    model = tiny("llama").double()
    delta = randomize(st.attach(model, st.methods.LoRA(rank=2, sites=("attn",))))
    with pytest.raises(MethodError, match="cannot be merged"):
        delta.merge()


@pytest.mark.parametrize("second", ["dora", "tarp", "lora"])
def test_unions_merge_in_their_order(second: str):
    """Each method folds as it runs, though another one has changed the weight before it."""
    other = {"dora": st.methods.DoRA(rank=2), "lora": st.methods.LoRA(rank=3),
             "tarp": st.methods.TARP(form="bilinear", rank=2, multiplicative=True, sites=("attn.q", "attn.v"))}[second]
    for order in (1, -1):
        model, inputs = tiny("bert").double(), batch("bert")
        delta = randomize(st.attach(model, [st.methods.LoRA(rank=2), other][::order]))
        own = output(model, inputs)
        delta.merge()
        torch.testing.assert_close(output(model, inputs), own)
