"""AdapterDrop against its paper: Houlsby's places in the upper blocks only, and no graph below them."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import SiteError
from slimtune.testing import assert_equation, batch, loss, site_io, tiny

AdapterDrop = st.methods.AdapterDrop


@pytest.mark.parametrize(("family", "site"), [
    ("t5", "decoder.1.attn"), ("bert", "encoder.1.mlp"), ("gpt2", "decoder.1.attn")])
def test_equation(family: str, site: str):
    p, _, y, out = site_io(st.attach(tiny(family).double(), AdapterDrop(bottleneck=5, drop=1)), site)
    h = F.gelu(y @ p["down"].T + p["down_bias"], approximate="tanh")
    assert_equation(out, y + h @ p["up"].T + p["up_bias"], p)


def test_nothing_is_in_the_lower_blocks_of_either_tower():
    delta = st.attach(tiny("t5"), AdapterDrop(bottleneck=5, drop=1))
    assert {slot.site.name for _, slot in delta.slots} == {
        f"{tower}.1.{role}" for tower in ("encoder", "decoder") for role in ("attn", "mlp")}
    assert delta.count().norms == 12 * 32  # of all blocks, as in the baseline of the Compacter paper


@pytest.mark.parametrize(("norms", "graph"), [("none", [False, True]), ("all", [True, True])])
def test_without_norms_there_is_no_graph_below_the_lowest_adapter(norms: str, graph: list[bool]):
    model, seen = tiny("bert"), []
    delta = st.attach(model, AdapterDrop(bottleneck=5, drop=1, norms=norms))
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)
                                                                  .requires_grad))
    loss(model, batch("bert")).backward()
    assert seen == graph
    assert all(p.grad is not None for p in delta.parameters())


def test_drop_must_leave_a_block():
    with pytest.raises(SiteError, match="choose a number below 2"):
        st.attach(tiny("bert"), AdapterDrop(drop=2))
    assert st.attach(tiny("bert"), AdapterDrop(bottleneck=5, drop=0)).count().adapter == 4 * (2 * 5 * 32 + 5 + 32)


def test_the_start():
    down = st.attach(tiny("bert"), AdapterDrop(bottleneck=64, drop=1)).state()["encoder.1.mlp.adapter_drop.down"]
    assert 0.009 < down.std() < 0.011
    assert down.abs().max() > 0.02 + 1e-3  # not cut at two deviations
    assert torch.isfinite(down).all()
