"""MLPHead: hidden layers in front of the task head."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import batch, meta, output, randomize, tiny

M = st.methods


@pytest.mark.parametrize(("family", "head"), [
    ("vit", "classifier"), ("bert", "classifier"), ("roberta", "classifier.dense")])
def test_equation(family: str, head: str):
    """The head's input, taken by a hook, through the layers by hand."""
    model, inputs = tiny(family).eval(), batch(family)
    delta = randomize(st.attach(model, M.MLPHead()))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(head).register_forward_hook(lambda m, a, y: seen.append(a[0]))
    output(model, inputs)
    after = seen.pop()
    with delta.disabled():
        output(model, inputs)
    handle.remove()
    p = delta.state()
    x = seen.pop()
    for i in (1, 2):
        x = F.relu(x @ p[f"features.head.mlp_head.w{i}"].T + p[f"features.head.mlp_head.b{i}"])
    torch.testing.assert_close(after, x)


def test_count():
    assert st.attach(meta.vit_b16_meta(), M.MLPHead()).count().adapter == 2 * (768 * 768 + 768)


def test_needs_a_head():
    with pytest.raises(MethodError, match="no linear task head"):
        st.attach(tiny("gpt2"), M.MLPHead())
