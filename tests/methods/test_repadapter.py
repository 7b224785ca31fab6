"""RepAdapter against its paper: y + s (B (A y + a) + b), B in groups, and its merge into what follows the norm."""
import pytest
import torch.nn.functional as F
from merge_cases import check_merge

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, doubled, meta, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize(("family", "site"), [("vit", "vision.1.norm.attn"), ("llama", "decoder.0.norm.mlp")])
def test_equation(family: str, site: str):
    """The grouped map as the paper's own grouped convolution of width 1."""
    method = M.RepAdapter(bottleneck=4, groups=2, scale=0.5)
    p, _, y, out = site_io(st.attach(tiny(family).double().eval(), method), site)
    h = F.conv1d(y.mT, p["down"][..., None], p["down_bias"])
    assert_equation(out, y + 0.5 * F.conv1d(h, p["up"][..., None], p["up_bias"], groups=2).mT, p)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "gpt2", "llama", "t5"])
def test_merges_into_the_projections(family: str):
    model = tiny(family).double().eval()
    inputs = doubled(batch(family))
    delta = randomize(st.attach(model, M.RepAdapter(bottleneck=4)))
    check_merge(delta, inputs)


def test_count():
    assert st.attach(meta.vit_b16_meta(), M.RepAdapter()).count().adapter == 239_808


def test_refuses():
    with pytest.raises(MethodError, match="pre-norm"):
        st.attach(tiny("bert"), M.RepAdapter())
    with pytest.raises(MethodError, match="divides not both"):
        st.attach(tiny("vit"), M.RepAdapter(bottleneck=3))
