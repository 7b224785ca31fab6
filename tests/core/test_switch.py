"""Several deltas at once: stacked, one after the other; or with weights, y + sum_t w_t (f_t(x, y) - y)."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import DeltaError, MethodError
from slimtune.testing import batch, output, randomize, tiny

M = st.methods


def two(method, family: str = "bert", **values):
    """A model with deltas a and b of other numbers."""
    model = tiny(family).double()
    deltas = [randomize(st.attach(model, method, name=name, **values), seed) for seed, name in enumerate("ab")]
    return model, batch(family), deltas


def adapter(p, y):
    return F.relu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def one_site():
    """Two adapters at one place: what they read there, their numbers, and what comes out, by name of what runs."""
    model, inputs, deltas = two(M.BottleneckAdapter(bottleneck=5, sites=("mlp",), blocks=(1,), head="none"))
    host, seen = model.bert.encoder.layer[1].output.dropout, {}
    host.register_forward_hook(lambda m, a, out: seen.update(out=out.detach().clone()))

    def run(*names: str, **values):
        st.activate(model, *names, **values)
        with torch.no_grad():
            output(model, inputs)
        return seen["out"]

    return run, [{n.rpartition(".")[2]: v for n, v in d.state().items()} for d in deltas]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_stacked_deltas_apply_one_after_the_other(order: str):
    run, params = one_site()
    y = run()
    for name in order:
        y = y + adapter(params["ab".index(name)], y)
    torch.testing.assert_close(run(*order), y)
    assert not torch.allclose(run(*reversed(order)), y)


def test_weighted_deltas_each_work_on_the_backbones_output():
    run, (a, b) = one_site()
    y = run()
    torch.testing.assert_close(run("a", "b", weights=(0.3, -0.8)), y + 0.3 * adapter(a, y) - 0.8 * adapter(b, y))
    torch.testing.assert_close(run("b", "a", weights=(-0.8, 0.3)), run("a", "b", weights=(0.3, -0.8)))
    assert not torch.allclose(run("a", "b", weights=(1, 1)), run("a", "b"))


METHODS = [M.LoRA(rank=2, head="none"), M.IA3(head="none"), M.Houlsby(bottleneck=4, norms="none", head="none"),
           M.ParallelAdapter(bottleneck=4, head="none"), M.SSF(head="none")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_all_the_weight_on_one_is_that_one(family: str, method):
    model, inputs, _ = two(method, family)
    st.activate(model, "a")
    alone = output(model, inputs)
    for names, weights in ((("a", "b"), (1.0, 0.0)), (("b", "a"), (0.0, 1.0)), (("a",), (1.0,))):
        st.activate(model, *names, weights=weights)
        torch.testing.assert_close(output(model, inputs), alone)
    st.activate(model, "a", "b", weights=(0.0, 0.0))
    averaged = output(model, inputs)
    st.activate(model)
    torch.testing.assert_close(averaged, output(model, inputs))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_reads_the_input_alone_is_stacked_by_weights_of_one(family: str):
    model, inputs, _ = two(M.LoRA(rank=2, sites=("linear",), head="none"), family)
    st.activate(model, "a", "b")
    stacked = output(model, inputs)
    st.activate(model, "a", "b", weights=(1.0, 1.0))
    torch.testing.assert_close(output(model, inputs), stacked)


def test_the_weights_gradients_reach_every_delta():
    model, inputs, (a, b) = two(M.LoRA(rank=2, head="none"))
    st.activate(model, "a", "b", weights=(0.5, 0.25))
    output(model, inputs).sum().backward()
    assert all(p.grad is not None and p.grad.any() for d in (a, b) for p in d.parameters())


def test_weights_end_with_the_next_switch():
    model, inputs, (a, _) = two(M.LoRA(rank=2, head="none"))
    a.activate()
    alone = output(model, inputs)
    st.activate(model, "a", "b", weights=(0.5, 0.5))
    mixed = output(model, inputs)
    with a.disabled():
        assert not torch.allclose(output(model, inputs), mixed)
    assert torch.equal(output(model, inputs), mixed)
    a.activate()
    assert torch.equal(output(model, inputs), alone)


def test_refusals():
    model, inputs, _ = two(M.LoRA(rank=2, head="none"))
    before = output(model, inputs)
    st.attach(model, M.PrefixTuning(length=3, head="none"), name="kv")
    st.activate(model, "b")
    with pytest.raises(MethodError, match="delta 'kv' cannot be averaged: PrefixTuning"):
        st.activate(model, "a", "kv", weights=(0.5, 0.5))
    with pytest.raises(DeltaError, match=r"2 deltas \(a b\) and 1 weights"):
        st.activate(model, "a", "b", weights=(0.5,))
    with pytest.raises(DeltaError, match=r"(?s)no delta named 'c'.*a b kv"):
        st.activate(model, "a", "c", weights=(0.5, 0.5))
    assert torch.equal(output(model, inputs), before)  # b alone, as before


def test_weights_outlive_what_fails_and_what_is_detached():
    model = tiny("bert")
    for name in "abc":
        st.attach(model, st.methods.LoRA(rank=2), name=name)
    st.activate(model, "a", "b", weights=(0.25, 0.75))
    plan = st.deltas(model)["a"].root.plan
    with pytest.raises(st.SlimtuneError):
        st.attach(model, st.methods.LoRA(sites=("nowhere",)), name="d")
    assert plan.weights == {"a": 0.25, "b": 0.75}
    st.deltas(model)["a"].detach()
    assert (plan.active, plan.weights) == (("b",), {"b": 0.75})
    with pytest.raises(st.SlimtuneError, match="does not run alone"):  # at a weight it is not what a merge would fold
        st.deltas(model)["b"].merge()
    with pytest.raises(st.SlimtuneError, match="Name each delta once"):
        st.activate(model, "b", "b", weights=(0.5,))
