"""Partial-k against plain torch: SGD on the tensors that a pattern names; and the counts of VPT's baseline."""
import re

import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError, SiteError
from slimtune.testing import batch, doubled, loss, meta, output, tiny

M = st.methods
CASES = [
    (M.PartialK(), "bert", r"layer\.1\.|^classifier"), (M.PartialK(k=2), "bert", r"encoder\.layer|^classifier"),
    (M.PartialK(), "vit", r"layers\.1\.|^vit\.layernorm\.|^classifier"),
    (M.PartialK(final_norm=False, head="none"), "vit", r"layers\.1\."),
    (M.PartialK(), "swin", r"layers\.1\.blocks\.0\.|^swin\.layernorm\.|^classifier"),
    (M.PartialK(), "gpt2", r"\.h\.1\.|ln_f"), (M.PartialK(), "t5", r"block\.1\.|final_layer_norm"),
    (M.PartialK(towers=("decoder",)), "t5", r"decoder\.block\.1\.|decoder\.final_layer_norm"),
    (M.PartialK(), "clip", r"layers\.1\.|final_layer_norm|post_layernorm"),
]


@pytest.mark.parametrize(("method", "family", "pattern"), CASES)
def test_two_steps_are_those_of_the_plain_model(method, family: str, pattern: str):
    inputs, plain, model = batch(family), tiny(family).double(), tiny(family).double()
    inputs = doubled(inputs)
    for name, p in plain.named_parameters():
        p.requires_grad_(bool(re.search(pattern, name)))
    delta = st.attach(model, method)
    trained = {n.removeprefix("own.").removeprefix("head.") for n, _ in delta.named_parameters()}
    assert trained == {n for n, p in plain.named_parameters() if p.requires_grad}
    for net, parameters in ((plain, [p for p in plain.parameters() if p.requires_grad]), (model, delta.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            loss(net, inputs).backward()
            optimizer.step()
    torch.testing.assert_close(output(model, inputs), output(plain, inputs))


def test_nothing_is_propagated_below():
    model = tiny("vit")
    st.attach(model, M.PartialK())
    assert not model.vit.layers[0](torch.randn(1, 17, 32)).requires_grad
    assert output(model, batch("vit")).requires_grad


def test_counts_on_vit_b16():
    """A block is 12 d^2 + 13 d, a LayerNorm 2 d. Table 1 of VPT: 3.00 backbones for 24 tasks, their heads included."""
    d, heads = 768, 1_624_897
    block = 12 * d**2 + 13 * d
    counts = [st.attach(meta.vit_b16_meta(), m).count().adapter for m in (
        M.PartialK(), M.PartialK(final_norm=False), M.PartialK(k=2), M.PartialK(k=12, final_norm=False))]
    assert counts == [7_087_872 + 1_536, block, 2 * block + 2 * d, 12 * block]
    assert block == 7_087_872
    assert round(1 + (24 * counts[0] + heads) / 85_798_656, 2) == 3.0


def test_refused():
    with pytest.raises(MethodError, match=r"PartialK\.k=3 is more than the encoder has blocks.\n  It has: 2\."):
        st.attach(tiny("bert"), M.PartialK(k=3))
    with pytest.raises(SiteError, match=r"asked for tower 'vision', which bert does not have\.\n  It has: encoder"):
        st.attach(tiny("bert"), M.PartialK(towers=("vision",)))
    with pytest.raises(MethodError, match=r"Set method\.k instead of blocks"):
        st.attach(tiny("bert"), M.PartialK(blocks=(-1,)))
