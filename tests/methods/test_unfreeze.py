"""Full, LinearProbe, BitFit and NormTuning: the base's own tensors, and no others, trained as plain torch would."""
import re

import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import batch, doubled, loss, output, tiny

M = st.methods
BIASES = r"(?<!classifier)\.bias$"
CASES = [
    (M.Full(), "bert", r"."), (M.Full(), "t5", r"."), (M.LinearProbe(), "bert", r"^classifier\."),
    (M.LinearProbe(), "vit", r"^classifier\."), (M.BitFit(), "bert", rf"{BIASES}|^classifier\."),
    (M.BitFit(), "gpt2", r"\.bias$"), (M.BitFit(sites=("attn.q", "mlp.up"), head="none"), "bert",
                                       r"(query|intermediate\.dense)\.bias$"),
    (M.NormTuning(head="none"), "bert", r"LayerNorm\.(weight|bias)$"),
    (M.NormTuning(), "gpt2", r"\.ln_[12f]\."), (M.NormTuning(), "t5", r"layer_norm\."),
    (M.NormTuning(), "llama", r"(layernorm|norm)\.weight$"),
    (M.NormTuning(blocks=(-1,), head="none"), "bert", r"layer\.1\..*LayerNorm\."),
]


@pytest.mark.parametrize(("method", "family", "pattern"), CASES)
def test_two_steps_are_those_of_the_plain_model(method, family: str, pattern: str):
    """SGD on the tensors that the pattern names, of an untouched model, gives the same model after two steps."""
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
    state = delta.state()
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(state.get(f"own.{name}", state.get(f"head.{name}")), p.detach())


def test_bitfit_refuses_a_backbone_without_biases_and_a_slice_of_one():
    with pytest.raises(MethodError, match="t5 has none there"):
        st.attach(tiny("t5"), M.BitFit())
    with pytest.raises(MethodError, match=r"slice of transformer\.h\.0\.attn\.c_attn\.bias"):
        st.attach(tiny("gpt2"), M.BitFit(sites=("attn.q",)))


def test_a_tied_tensor_is_trained_in_all_its_places():
    model = tiny("gpt2")
    delta = st.attach(model, M.Full())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "own.transformer.wte.weight" in delta.state()
    assert "own.lm_head.weight" not in delta.state()
