"""Gates: head_h <- c_h head_h before the output projection, and c * act(x) before the down-projection."""
import pytest
import torch

import slimtune as st
from slimtune.testing import assert_equation, batch, loss, output, randomize, site_io, tiny


@pytest.mark.parametrize(("family", "site", "width"), [
    ("bert", "encoder.1.attn.heads", 8), ("bert", "encoder.0.mlp.act", 1), ("gpt2", "decoder.0.attn.heads", 8),
    ("t5", "decoder.1.cross.attn.heads", 8), ("llama", "decoder.0.attn.heads", 16), ("llama", "decoder.1.mlp.act", 1)])
def test_equation(family: str, site: str, width: int):
    """A coefficient covers a head; with two heads to a key, both of them."""
    p, _, y, out = site_io(randomize(st.attach(tiny(family).double(), st.methods.Gates())), site)
    wide = torch.stack([p["c"][i // width] for i in range(y.shape[-1])])
    assert_equation(out, y * wide, p)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_closed_gate_takes_its_heads_out(family: str):
    """Oracle: values of zero for the closed heads, whose softmax then weighs nothing."""
    model, inputs = tiny(family).double(), batch(family)
    delta = st.attach(model, st.methods.Gates(sites=("attn.heads",)))
    for name, c in delta.named_parameters():
        if name.endswith("gates.c"):
            c[1] = 0
    gated = output(model, inputs)
    delta.detach()
    for block in range(2):
        site = next(s for s in st.dissect(model).sites if s.role == "attn.v" and s.block == block)
        value = model.get_submodule(site.path)
        value.weight[8:16] = 0
        if value.bias is not None:
            value.bias[8:16] = 0
    torch.testing.assert_close(output(model, inputs), gated)


def test_count_of_bert_base():
    from transformers import BertConfig, BertForSequenceClassification
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    assert st.attach(model, st.methods.Gates()).count().adapter == 12 * (12 + 3072) == 37_008
    assert st.attach(model, st.methods.Gates(hidden=True), name="wide").count().adapter == 37_008 + 768


def test_penalty_is_the_l1_norm_of_the_coefficients():
    model = tiny("bert").double()
    delta = st.attach(model, st.methods.Gates(l1=0.01))
    assert delta.penalty().item() == pytest.approx(0.01 * 2 * (4 + 64))  # type: ignore[union-attr]
    inputs = batch("bert")
    loss(model, inputs).backward()
    plain = {n: p.grad.clone() for n, p in delta.named_parameters() if n.endswith("gates.c")}
    delta.penalty().backward()  # type: ignore[union-attr]
    for n, p in delta.named_parameters():
        if n in plain:
            torch.testing.assert_close(p.grad, plain[n] + 0.01)
    assert st.attach(model, st.methods.Gates(), name="free").penalty() is None
    wide = st.attach(tiny("bert"), st.methods.Gates(l1=0.01, hidden=True))
    assert wide.penalty().item() == pytest.approx(0.01 * (2 * (4 + 64) + 32))  # type: ignore[union-attr]


def test_other_sites_are_refused():
    with pytest.raises(st.SlimtuneError, match=r"'encoder\.0\.attn\.q' is neither"):
        st.attach(tiny("bert"), st.methods.Gates(sites=("attn.q",)))
