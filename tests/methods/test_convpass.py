"""Convpass against its paper: a 3 x 3 convolution of the patch map between two projections."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, meta, site_io, tiny

M = st.methods


def quick(t):
    return t * torch.sigmoid(1.702 * t)


@pytest.mark.parametrize(("family", "site", "first"), [
    ("vit", "vision.1.mlp", 1), ("vit", "vision.0.attn", 1), ("deit", "vision.0.attn", 2),
    ("swin", "vision.0.attn", 0)])
def test_equation(family: str, site: str, first: int):
    p, x, y, out = site_io(st.attach(tiny(family).double().eval(), M.Convpass(bottleneck=4, scale=2.0)), site)
    h = quick(x @ p["down"].T + p["down_bias"]).flatten(1, -2)
    side = round((h.shape[1] - first)**0.5)
    image = h[:, first:].mT.reshape(len(h), 4, side, side)
    patches = F.conv2d(image, p["conv"], p["conv_bias"], padding=1).flatten(2).mT
    tokens = [F.conv2d(h[:, i, :, None, None], p["conv"], p["conv_bias"], padding=1).flatten(1)[:, None]
              for i in range(first)]                                      # a class token is an image of one patch
    g = quick(torch.cat([*tokens, patches], 1)).view(*x.shape[:-1], 4)
    assert_equation(out, y + 2 * (g @ p["up"].T + p["up_bias"]), p)


def test_starts_as_the_identity_of_the_map():
    delta = st.attach(tiny("vit"), M.Convpass(bottleneck=4))
    conv = delta.state()["vision.0.mlp.convpass.conv"]
    assert torch.equal(conv[:, :, 1, 1], torch.eye(4))
    assert conv.abs().sum() == 4


def test_count():
    assert st.attach(meta.vit_b16_meta(), M.Convpass()).count().adapter == 327_552


def test_refuses_text():
    with pytest.raises(MethodError, match="no image"):
        st.attach(tiny("bert"), M.Convpass())
