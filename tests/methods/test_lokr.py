"""LoKr against its paper: y + (alpha / r) (C (x) (B A)) x, without the matrix; its widths are split as PEFT's."""
import pytest
import torch
from example_axes import assert_example_axes

import slimtune as st
from slimtune.methods.lokr import split
from slimtune.testing import assert_equation, batch, meta, output, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn.q"), ("bert", "encoder.1.mlp.up"), ("gpt2", "decoder.0.mlp.down"),
    ("t5", "decoder.1.cross.attn.v")])
@pytest.mark.parametrize(("rank", "factor", "full"), [(3, None, False), (3, 2, False), (4, None, True)])
def test_equation(family: str, site: str, rank: int, factor, full: bool):
    method = M.LoKr(rank=rank, alpha=6.0, factor=factor, sites=(site.partition(".")[2].partition(".")[2],))
    p, x, y, out = site_io(st.attach(tiny(family).double(), method), site)
    assert ("W" in p) == full
    assert_equation(out, y + 6.0 / rank * x @ torch.kron(p["C"], p["W"] if full else p["B"] @ p["A"]).T, p)


@pytest.mark.parametrize(("rank", "site"), [(3, "encoder.0.attn.q"), (4, "encoder.0.mlp.up")])
def test_every_parameter_may_have_an_example_axis(rank: int, site: str):
    assert_example_axes(M.LoKr(rank=rank, sites=("attn.q", "mlp.up")), site)


@pytest.mark.parametrize("rank", [3, 4])
def test_it_is_pefts(rank: int):
    from peft import LoKrConfig, get_peft_model
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, M.LoKr(rank=rank, alpha=6.0, head="none")))
    peer = get_peft_model(tiny("bert").double(), LoKrConfig(
        r=rank, alpha=6, target_modules=["query", "value"])).double().eval()
    names = {"C": "lokr_w1", "W": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}
    with torch.no_grad():
        for name, p in delta.named_parameters():
            _, block, _, role, _, which = name.split(".")
            at = f"bert.encoder.layer.{block}.attention.self.{'query' if role == 'q' else 'value'}"
            layer = peer.base_model.model.get_submodule(at)
            getattr(layer, names[which])["default"].copy_(p)
    torch.testing.assert_close(output(model, inputs), output(peer, inputs))


def test_widths_are_split_as_pefts():
    from peft.tuners.lokr.layer import factorization
    for width in (*range(1, 130), 768, 1024, 3072):
        assert split(width) == factorization(width, -1)
        for factor in (1, 2, 3, 4, 8, 16, 40):
            assert split(width, factor) == factorization(width, factor), (width, factor)


def test_count():
    assert st.attach(meta.bert_base_meta(), M.LoKr(rank=8)).count().adapter == 24 * (24 * 24 + 8 * (32 + 32))
