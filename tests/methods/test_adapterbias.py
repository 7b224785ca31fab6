"""AdapterBias against its paper: y + alpha(x) v, x the feed-forward activation, behind the dropout."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny

AdapterBias = st.methods.AdapterBias


@pytest.mark.parametrize("share", ["none", "alpha", "v", "both"])
@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.0.mlp"), ("gpt2", "decoder.0.mlp"), ("t5", "encoder.0.mlp")])
def test_equation(family: str, site: str, share: str):
    """Each token's shift is alpha v: over tokens its rank is 1, and alpha is another for each."""
    method = AdapterBias(share=share, sites=(site.replace(".0.", "."),))
    p, x, y, out = site_io(st.attach(tiny(family).double(), method), site)
    assert x.shape[-1] == 64
    alpha = x @ p["a"] + p["c"]
    assert_equation(out, y + alpha[..., None] * p["v"], p)
    assert torch.linalg.matrix_rank((out - y).flatten(0, 1)) == 1
    assert len(alpha.flatten().round(decimals=9).unique()) > 1


def test_placement():
    """In training: x is what enters the down-projection, and the shift is not dropped out."""
    model, seen = tiny("bert", dropout=True).double().train(), {}
    last = model.bert.encoder.layer[0].output
    last.dense.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach()))
    last.dropout.register_forward_hook(lambda m, a, y: seen.update(y=y.detach().clone()))
    delta = randomize(st.attach(model, AdapterBias()))
    last.dropout.register_forward_hook(lambda m, a, out: seen.update(out=out.detach()))
    output(model, batch("bert"))
    p = {n: delta.state()[f"encoder.0.mlp.adapterbias.{n}"] for n in ("a", "c", "v")}
    assert (seen["y"] == 0).any()
    torch.testing.assert_close(seen["out"] - seen["y"], (seen["x"] @ p["a"] + p["c"])[..., None] * p["v"])


def test_it_starts_as_an_identity_and_then_both_factors_move():
    model, inputs = tiny("bert"), batch("bert")
    before = output(model, inputs)
    delta = st.attach(model, AdapterBias(head="none", norms="none"))
    assert torch.equal(output(model, inputs), before)
    for step in range(2):
        delta.model.zero_grad()
        output(model, inputs).square().sum().backward()
        moved = {n.rpartition(".")[2] for n, p in delta.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == ({"v"} if step == 0 else {"v", "a", "c"})
        torch.optim.SGD(delta.parameters(), lr=0.1).step()


def test_the_norms_are_the_papers_or_the_codes():
    paper = [n for n, _ in st.attach(tiny("bert"), AdapterBias()).named_parameters() if n.startswith("own")]
    assert paper == [f"own.bert.encoder.layer.{i}.output.LayerNorm.{n}" for i in (0, 1) for n in ("weight", "bias")]
    code = [n for n, _ in st.attach(tiny("bert"), AdapterBias(norms="mlp+embed")).named_parameters()
            if n.startswith("own")]
    assert set(code) - set(paper) == {f"own.bert.embeddings.LayerNorm.{n}" for n in ("weight", "bias")}


@pytest.mark.parametrize(("share", "shared", "numbers"), [
    ("none", set(), 2 * (64 + 1 + 32)), ("alpha", {"a", "c"}, 64 + 1 + 2 * 32), ("v", {"v"}, 2 * (64 + 1) + 32),
    ("both", {"a", "c", "v"}, 64 + 1 + 32)])
def test_what_is_shared_is_one_tensor(share: str, shared: set[str], numbers: int):
    delta = st.attach(tiny("bert"), AdapterBias(share=share))
    assert {n.rpartition(".")[2] for n in delta.state() if n.startswith("shared")} == shared
    assert delta.count().adapter == numbers


def test_blocks_of_other_widths_share_nothing():
    with pytest.raises(MethodError, match="Set share='none'"):
        st.attach(tiny("swin"), AdapterBias(share="v"))
    assert st.attach(tiny("swin"), AdapterBias()).count().adapter > 0
