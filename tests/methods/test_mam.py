"""MAM against its paper: prefix tuning and the scaled parallel adapter, attached as one."""
import pytest
import torch

import slimtune as st
from slimtune.testing import batch, loss, output, randomize, tiny

M = st.methods


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_it_is_the_union_of_its_two(family: str, hidden: int | None):
    """Attached as a list: the same tensors, the same start, and bitwise the same output and gradients."""
    pair = [M.PrefixTuning(length=3, hidden=hidden), M.ScaledParallelAdapter(bottleneck=4, scale=2.0)]
    found = []
    for method in (M.MAM(length=3, hidden=hidden, bottleneck=4, scale=2.0), pair):
        model, inputs = tiny(family), batch(family)
        delta = st.attach(model, method)
        start = output(model, inputs)
        randomize(delta)
        value = loss(model, inputs)
        found.append((start, output(model, inputs), dict(zip(delta.state(), torch.autograd.grad(
            value, list(delta.parameters())), strict=True))))
    (start, out, grads), (start_2, out_2, grads_2) = found
    assert torch.equal(start, start_2)
    assert torch.equal(out, out_2)
    assert grads.keys() == grads_2.keys()
    assert all(torch.equal(grads[n], grads_2[n]) for n in grads)


def test_the_feed_forward_part_starts_as_an_identity():
    delta = st.attach(tiny("bert"), M.MAM(length=3, bottleneck=4))
    ups = [v for n, v in delta.state().items() if n.endswith("scaled_parallel_adapter.up")]
    assert len(ups) == 2
    assert not torch.stack(ups).any()


def test_what_it_passes_on():
    """Head, norms and blocks hold for both parts; the reparametrisation is dropped in what is stored."""
    delta = st.attach(tiny("bart"), M.MAM(length=3, hidden=5, bottleneck=4, dropout=0.1, blocks=(1,), norms="mlp"))
    assert {slot.site.block for _, slot in delta.slots} == {1}
    assert [type(m).__name__ for m in delta.methods] == ["PrefixTuning", "ScaledParallelAdapter"]
    assert delta.methods[1].dropout == 0.1
    assert delta.count().norms == 4 * 2 * 32
    flat = 3 * 2 * 3 * 32 + 2 * (2 * 4 * 32 + 4 + 32)
    assert delta.count().stored == flat + delta.count().norms
