"""AdapterFusion against its paper: y + sum_t softmax_t(Q(u) . K(z_t)) V(z_t), over the adapters of attached deltas."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny

Fusion = st.methods.AdapterFusion


def mixture(p, u):
    """A slow loop over the adapters."""
    z = [F.relu(u @ p["down"][t].T + p["down_bias"][t]) @ p["up"][t].T + p["up_bias"][t] for t in range(len(p["up"]))]
    query = u @ p["query"].T + p["query_bias"]
    scores = torch.stack([(query * (zt @ p["key"].T + p["key_bias"])).sum(-1) for zt in z], -1).softmax(-1)
    return sum(scores[..., t, None] * (zt @ p["value"].T) for t, zt in enumerate(z))


def fused(family: str):
    model = tiny(family).double()
    for seed, width in ((1, 3), (2, 5)):
        randomize(st.attach(model, st.methods.Pfeiffer(bottleneck=width), name=f"task{seed}"), seed=seed)
    return model, Fusion.of(model, ["task1", "task2"])


@pytest.mark.parametrize(("family", "site"), [("gpt2", "decoder.1.mlp"), ("bert", "encoder.0.norm.mlp")])
def test_equation(family: str, site: str):
    model, delta = fused(family)
    p, x, u, out = site_io(delta, site)
    trained = {n: v for n, v in p.items() if v.requires_grad and n != "key_bias"}   # a shift of all keys moves nothing
    if family == "gpt2":
        return assert_equation(out, u + mixture(p, u), trained)
    ln = model.get_submodule("bert.encoder.layer.0.output.LayerNorm")
    assert_equation(out, F.layer_norm(mixture(p, u) + x, (32,), ln.weight, ln.bias, ln.eps), trained)


def test_takes_the_adapters_and_keeps_them_frozen():
    model, delta = fused("bert")
    state, one, two = (d.state() for d in (delta, st.deltas(model)["task1"], st.deltas(model)["task2"]))
    at = "encoder.1.norm.mlp."
    assert torch.equal(state[at + "adapter_fusion.down"][0, :3], one[at + "pfeiffer.down"])
    assert not state[at + "adapter_fusion.down"][0, 3:].any()                       # filled up with silent units
    assert torch.equal(state[at + "adapter_fusion.up"][1], two[at + "pfeiffer.up"])
    trained = {n.rpartition(".")[2] for n, _ in delta.named_parameters() if "adapter_fusion" in n}
    assert trained == {"query", "query_bias", "key", "key_bias", "value"}
    assert delta.count().adapter == 2 * (3 * 32 * 32 + 2 * 32)


def test_one_adapter_with_v_the_identity_is_that_adapter():
    model, _ = fused("bert")
    st.activate(model, "task1")
    own = output(model, inputs := batch("bert"))
    head = {n: t for n, t in st.deltas(model)["task1"].state().items() if n.startswith("head.")}
    delta = Fusion.of(model, ["task1"], name="one")
    delta.load_state({n: torch.eye(32).double() if n.endswith("value") else head.get(n, t)
                          for n, t in delta.state().items()})
    delta.activate()
    torch.testing.assert_close(output(model, inputs), own)


def test_penalty():
    _, delta = fused("bert")
    randomize(delta)
    values = [t for n, t in delta.state().items() if n.endswith("value")]
    torch.testing.assert_close(delta.penalty(), 0.01 * sum(((torch.eye(32) - v) ** 2).sum() for v in values))
    assert Fusion(regularization=0).penalty([]) is None


def test_refuses_what_it_cannot_mix():
    model = tiny("bert")
    st.attach(model, st.methods.Pfeiffer(bottleneck=4), name="a")
    st.attach(model, st.methods.LoRA(), name="lora")
    st.attach(model, st.methods.Pfeiffer(bottleneck=4, activation="gelu"), name="b")
    with pytest.raises(MethodError, match="Pfeiffer"):
        Fusion.of(model, ["a", "lora"])
    with pytest.raises(MethodError, match="activation"):
        Fusion.of(model, ["a", "b"])
    with pytest.raises(st.SlimtuneError, match="no delta named 'c'"):
        Fusion.of(model, ["a", "c"])
    with pytest.raises(MethodError, match="sequential"):
        st.attach(model, Fusion(layer_norm="in"), name="f")
