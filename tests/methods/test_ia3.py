"""IA3 against its paper: keys, values and the activations before the down-projection are rescaled."""
import pytest
import torch

import slimtune as st
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn.k"), ("bert", "encoder.0.mlp.act"), ("gpt2", "decoder.0.attn.k"),
    ("t5", "decoder.1.cross.attn.v"), ("llama", "decoder.0.mlp.act")])
def test_equation(family: str, site: str):
    p, _, y, out = site_io(st.attach(tiny(family).double(), st.methods.IA3()), site)
    assert_equation(out, y * p["l"], p)


@torch.no_grad()
def test_it_rescales_rows_and_columns_of_the_weights():
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, st.methods.IA3()))
    own, state = output(model, inputs), delta.state()
    head = {n.removeprefix("head.classifier."): t for n, t in state.items() if n.startswith("head.")}
    delta.detach()
    model.classifier.load_state_dict(head)
    for i, layer in enumerate(model.bert.encoder.layer):
        k, v, ff = (state[f"encoder.{i}.{role}.ia3.l"] for role in ("attn.k", "attn.v", "mlp.act"))
        for linear, scale in ((layer.attention.self.key, k), (layer.attention.self.value, v)):
            linear.weight *= scale[:, None]
            linear.bias *= scale
        layer.output.dense.weight *= ff
    torch.testing.assert_close(output(model, inputs), own)


def test_a_gated_network_is_rescaled_before_its_down_projection():
    """The product of gate and wi_1 is what T-Few's vector on wi_1's output scales: the two commute."""
    delta = st.attach(tiny("t5", feed_forward_proj="gated-gelu").double(), st.methods.IA3(sites=("mlp.act",)))
    assert delta.count().adapter == 4 * 64
    p, _, y, out = site_io(delta, "encoder.0.mlp.act")
    assert_equation(out, y * p["l"], p)
