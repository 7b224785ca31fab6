"""LoHa against its paper: y + (alpha / r) ((B1 A1) * (B2 A2)) x, at ranks where it is low-rank and where not; PEFT."""
import pytest
import torch
from example_axes import assert_example_axes

import slimtune as st
from slimtune.testing import assert_equation, batch, meta, output, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize("rank", [2, 5])  # of 32: 4 ranks in all, and 25, which a matrix is cheaper than
@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn.q"), ("gpt2", "decoder.0.attn.v"), ("t5", "decoder.1.cross.attn.v")])
def test_equation(family: str, site: str, rank: int):
    p, x, y, out = site_io(st.attach(tiny(family).double(), M.LoHa(rank=rank, alpha=6.0)), site)
    assert_equation(out, y + 6.0 / rank * x @ ((p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])).T, p)


@pytest.mark.parametrize("rank", [2, 5])
def test_every_parameter_may_have_an_example_axis(rank: int):
    assert_example_axes(M.LoHa(rank=rank))


@pytest.mark.parametrize(("rank", "matrix"), [(2, False), (5, True)])
def test_the_matrix_is_made_only_where_it_is_cheaper(rank: int, matrix: bool):
    delta, saved = st.attach(tiny("bert"), M.LoHa(rank=rank)), []
    slot = delta.slots[0][1]
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        slot.method.forward(slot.bind(x), x, y)
    assert (32 * 32 in saved) == matrix


def test_it_is_pefts():
    from peft import LoHaConfig, get_peft_model
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, M.LoHa(rank=3, alpha=6.0, head="none")))
    peer = get_peft_model(tiny("bert").double(), LoHaConfig(
        r=3, alpha=6, target_modules=["query", "value"])).double().eval()
    with torch.no_grad():
        for name, p in delta.named_parameters():
            _, block, _, role, _, which = name.split(".")
            at = f"bert.encoder.layer.{block}.attention.self.{'query' if role == 'q' else 'value'}"
            layer = peer.base_model.model.get_submodule(at)
            getattr(layer, f"hada_w{which[1]}_{'a' if which[0] == 'B' else 'b'}")["default"].copy_(p)
    torch.testing.assert_close(output(model, inputs), output(peer, inputs))


def test_count():
    assert st.attach(meta.bert_base_meta(), M.LoHa(rank=8)).count().adapter == 24 * 2 * 8 * (768 + 768)
