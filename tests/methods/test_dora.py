"""DoRA against its paper, m V / ||V|| with V = W0 + s B A and the norm a constant, and against PEFT."""
import pytest
import torch
import torch.nn.functional as F
from example_axes import assert_example_axes

import slimtune as st
from slimtune.testing import assert_equation, batch, meta, output, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize(("family", "site", "path", "part"), [
    ("bert", "encoder.1.attn.q", "bert.encoder.layer.1.attention.self.query", None),
    ("gpt2", "decoder.0.attn.v", "transformer.h.0.attn.c_attn", slice(64, 96)),
    ("llama", "decoder.1.attn.v", "model.layers.1.self_attn.v_proj", None)])
def test_equation(family: str, site: str, path: str, part):
    model = tiny(family).double()
    p, x, _, out = site_io(st.attach(model, M.DoRA(rank=3, alpha=6.0)), site)
    linear = model.get_submodule(path)
    weight, bias = linear.weight, linear.bias
    if part is not None:  # c_attn is (in, 3 out): queries, keys, values
        weight, bias = weight.T[part], bias[part]
    V = weight + 2.0 * p["B"] @ p["A"]
    assert_equation(out, F.linear(x, (p["m"] / V.detach().norm(dim=1))[:, None] * V, bias), p)


def test_every_parameter_may_have_an_example_axis():
    assert_example_axes(M.DoRA(rank=3))


def test_it_starts_from_the_norms():
    model = tiny("bert")
    m = st.attach(model, M.DoRA()).state()["encoder.0.attn.v.dora.m"]
    torch.testing.assert_close(m, model.bert.encoder.layer[0].attention.self.value.weight.norm(dim=1))


def test_it_is_pefts():
    from peft import LoraConfig, get_peft_model
    model, inputs = tiny("bert").double(), batch("bert")
    delta = randomize(st.attach(model, M.DoRA(rank=3, alpha=6.0, head="none")))
    peer = get_peft_model(tiny("bert").double(), LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=["query", "value"])).double().eval()
    pairs = []
    for name, p in delta.named_parameters():
        _, block, _, role, _, which = name.split(".")
        at = f"bert.encoder.layer.{block}.attention.self.{'query' if role == 'q' else 'value'}"
        layer = peer.base_model.model.get_submodule(at)
        other = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector}[which]["default"].weight
        with torch.no_grad():
            other.copy_(p)
        pairs.append((p, other))
    own, theirs = output(model, inputs), output(peer, inputs)
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(torch.autograd.grad(own.square().sum(), [p for p, _ in pairs]),
                               torch.autograd.grad(theirs.square().sum(), [other for _, other in pairs]))


def test_the_merged_weight():
    model = tiny("bert").double()
    query = model.bert.encoder.layer[0].attention.self.query
    weight = query.weight.detach().clone()
    delta = randomize(st.attach(model, M.DoRA(rank=3, alpha=6.0)))
    p = {n: delta.state()[f"encoder.0.attn.q.dora.{n}"] for n in "ABm"}
    delta.merge()
    V = weight + 2.0 * p["B"] @ p["A"]
    torch.testing.assert_close(query.weight.detach(), p["m"][:, None] * V / V.norm(dim=1, keepdim=True))


def test_a_row_of_zeros_stays_finite():
    model = tiny("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.weight[3] = 0
    plain = output(model, batch("bert")).detach()
    delta = st.attach(model, M.DoRA(head="none"))
    out = output(model, batch("bert"))
    assert torch.equal(out, plain)
    out.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in delta.parameters())


def test_count():
    assert st.attach(meta.bert_base_meta(), M.DoRA(rank=8)).count().adapter == 294_912 + 24 * 768
