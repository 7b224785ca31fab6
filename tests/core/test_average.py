"""Averages: theta = sum_t w_t theta_t, and theta_0 + sum_t w_t (theta_t - theta_0) for tensors of the backbone."""
import pytest
import torch

import slimtune as st
from slimtune.errors import DeltaError, MethodError, SiteError
from slimtune.testing import batch, output, randomize, small, tiny

M = st.methods


@pytest.mark.parametrize("name", st.methods.names())
def test_one_delta_of_weight_one_is_that_delta(name: str):
    """Bitwise, in state and output, for every method that goes on BERT."""
    model, inputs = tiny("bert"), batch("bert")
    try:
        a = st.attach(model, small(st.methods.get(name)), name="a")
    except (MethodError, SiteError):
        pytest.skip("does not go on BERT")
    randomize(a)
    own = output(model, inputs)
    mix = st.average(model, {"a": 1.0}, "mix")
    assert a.active
    assert list(mix.state()) == list(a.state())
    assert all(torch.equal(v, a.state()[n]) for n, v in mix.state().items())
    assert not any(v.data_ptr() == a.state()[n].data_ptr() for n, v in mix.state().items() if v.numel())
    mix.activate()
    assert torch.equal(output(model, inputs), own)


def test_the_sum_by_hand():
    """What is added is summed; norms and head, which the backbone has, by their differences from it."""
    model = tiny("bert")
    base = {f"{group}.{n}": p.detach().clone() for n, p in model.named_parameters() for group in ("own", "head")}
    a, b = (randomize(st.attach(model, M.LoRA(rank=2, norms="all"), name=n), seed) for seed, n in enumerate("ab"))
    mix = st.average(model, {"a": 0.75, "b": 0.5}, "mix")
    groups = set()
    for name, value in mix.state().items():
        zero = base.get(name, torch.zeros(())).double()
        wanted = zero + 0.75 * (a.state()[name].double() - zero) + 0.5 * (b.state()[name].double() - zero)
        torch.testing.assert_close(value, wanted.float(), atol=0, rtol=1e-6)
        groups.add(name.split(".")[0])
    assert groups == {"encoder", "own", "head"}


def test_a_sum_of_what_is_linear_is_the_sum_of_what_it_does():
    """IA3's l is linear in what it does to y, so averages of parameters and of outputs agree at its sites."""
    model, inputs = tiny("bert").double(), batch("bert")
    for seed, name in enumerate("ab"):
        randomize(st.attach(model, M.IA3(head="none"), name=name), seed)
    mix = st.average(model, {"a": 0.25, "b": 0.75}, "mix")
    mix.activate()
    found = output(model, inputs)
    st.activate(model, "a", "b", weights=(0.25, 0.75))
    torch.testing.assert_close(output(model, inputs), found)


def test_it_leaves_what_runs_as_it_was():
    model, inputs = tiny("bert"), batch("bert")
    for seed, name in enumerate("ab"):
        randomize(st.attach(model, M.LoRA(rank=2), name=name), seed)
    st.activate(model, "a", "b", weights=(0.5, 0.25))
    before = output(model, inputs)
    st.average(model, {"b": 0.5}, "mix")
    assert torch.equal(output(model, inputs), before)


def test_refusals():
    model = tiny("bert")
    for name, method in (("a", M.LoRA(rank=2)), ("b", M.LoRA(rank=3)), ("c", M.IA3())):
        st.attach(model, method, name=name)
    same = st.attach(model, M.LoRA(rank=2), name="d")
    for weights, why in (({"a": 0.5, "b": 0.5}, "other methods or settings"),
                         ({"a": 0.5, "c": 0.5}, "other methods or settings"), ({}, "no deltas"),
                         ({"a": 0.5, "e": 0.5}, r"(?s)no delta named 'e'.*a b c d")):
        with pytest.raises(DeltaError, match=why):
            st.average(model, weights, "mix")
    same.info["labels"] = ["yes", "no", "maybe"]
    with pytest.raises(DeltaError, match="other labels"):
        st.average(model, {"a": 0.5, "d": 0.5}, "mix")
    with pytest.raises(DeltaError, match="'a' is attached already"):
        st.average(model, {"a": 1.0}, "a")
    assert set(st.deltas(model)) == set("abcd")
