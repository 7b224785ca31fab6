"""AddedBias: y + b behind every linear map and every norm of a block, which is BitFit where there are biases."""
import pytest
import torch

import slimtune as st
from slimtune.testing import assert_equation, batch, meta, output, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize("site", ["encoder.0.attn.k", "decoder.1.mlp.down", "decoder.0.norm.cross"])
def test_equation(site: str):
    p, _, y, out = site_io(st.attach(tiny("t5").double(), M.AddedBias()), site)
    assert_equation(out, y + p["b"], p)


def test_equals_bitfit_where_there_are_biases():
    """On BERT the same values, added here and trained there, give the same output."""
    model, inputs = tiny("bert").double(), batch("bert")
    added = randomize(st.attach(model, M.AddedBias(head="none"), name="added"))
    own, state = output(model, inputs), added.state()
    bitfit = st.attach(model, M.BitFit(sites=("linear", "norm.attn", "norm.mlp"), head="none"), name="bitfit")
    anatomy = st.dissect(model)
    paths = {f"own.{s.path}.bias": s.name for s in anatomy.sites if f"{s.name}.added_bias.b" in state}
    bitfit.load_state({n: t + state[f"{paths[n]}.added_bias.b"] for n, t in bitfit.state().items()})
    torch.testing.assert_close(output(model, inputs), own)


def test_count_on_t5():
    """Biases of 12 and 12 blocks, as the paper counts them: 101,376 and 147,456."""
    assert st.attach(meta.t5_base_meta(), M.AddedBias()).count().adapter == 101_376 + 147_456
