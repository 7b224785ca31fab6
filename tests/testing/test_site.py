"""site_io records what the backbone's own modules read and give; its errors name what exists."""
import pytest
import torch

import slimtune as st
from slimtune.errors import SiteError
from slimtune.testing import assert_equation, batch, output, site_io, tiny


def test_x_and_y_are_what_passes_in_the_plain_backbone():
    plain, seen = tiny("gpt2"), {}
    plain.transformer.h[0].attn.c_attn.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y[..., 64:]))
    output(plain, batch("gpt2"))
    _, x, y, out = site_io(st.attach(tiny("gpt2"), st.methods.LoRA(rank=2)), "decoder.0.attn.v")
    assert torch.equal(x, seen["x"])
    assert torch.equal(y, seen["y"])
    assert out.shape == y.shape
    assert not torch.equal(out, y)


def test_errors_name_the_sites():
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    with pytest.raises(SiteError, match=r"(?s)There are:.*encoder.0.attn.q.*Did you mean 'encoder.1.attn.q'"):
        site_io(delta, "encoder.1.atn.q")
    with pytest.raises(SiteError, match="does not change a module's output there"):
        site_io(st.attach(tiny("bert"), st.methods.PrefixTuning(length=2)), "encoder.0.attn")


def test_an_equation_that_is_wrong_in_its_gradient_alone_fails():
    p = {"v": torch.ones(3, requires_grad=True)}
    with pytest.raises(AssertionError, match="the gradient of v"):
        assert_equation(2 * p["v"], p["v"] + p["v"].detach(), p)
    with pytest.raises(AssertionError, match="no gradient for v"):
        assert_equation(p["v"] * 1, p["v"] * 0 + 1, p)
