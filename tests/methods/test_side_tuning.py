"""Side-tuning against its paper: out = a B(x) + (1 - a) S(x), with S thin blocks of the backbone's own class."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.core.side import Side
from slimtune.errors import MethodError
from slimtune.testing import batch, check_method, output, randomize, tiny
from slimtune.testing.tiny import NAMES

SideTuning = st.methods.get("side_tuning")


def linear(p, name, x):
    return F.linear(x, p[name], p[f"{name}_bias"])


def norm(p, name, x):
    return F.layer_norm(x, (8,), p[name], p[f"{name}_bias"], 1e-12)


def block(p, s, mask):
    """A post-norm block of width 8 with four heads of two."""
    q, k, v = (linear(p, f"self_{n}", s).unflatten(-1, (4, 2)).transpose(1, 2) for n in "qkv")
    heads = ((q @ k.mT / 2**0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    s = norm(p, "norm_self", s + linear(p, "self_o", heads))
    return norm(p, "norm_mlp", s + linear(p, "mlp_down", F.gelu(linear(p, "mlp_up", s))))


@pytest.mark.parametrize("depth", [1, 2])
def test_equation(depth: int):
    model, inputs, seen = tiny("bert").double(), batch("bert"), {}
    last = model.bert.encoder.layer[-1]
    model.bert.embeddings.register_forward_hook(lambda m, a, y: seen.update(first=y.detach()))
    last.register_forward_hook(lambda m, a, y: seen.update(base=(y[0] if isinstance(y, tuple) else y).detach()))
    delta = randomize(st.attach(model, SideTuning(reduction=4, depth=depth, head="none")))
    last.register_forward_hook(lambda m, a, y: seen.update(out=y[0] if isinstance(y, tuple) else y))
    output(model, inputs)
    named = dict(delta.named_parameters())
    at = lambda prefix: {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}  # noqa: E731
    mask = (1 - inputs["attention_mask"].double())[:, None, None] * -1e9
    s = linear(at("encoder.start.side_tuning."), "weight", seen["first"])
    for i in range(depth):
        s = block(at(f"encoder.{i}.block.side_tuning."), s, mask)
    top = at("encoder.top.side_tuning.")
    a = torch.sigmoid(top["blend"])
    wanted = a * seen["base"] + (1 - a) * linear(top, "top", norm(top, "norm_top", s))
    st.testing.assert_equation(seen["out"], wanted, {n: t for n, t in named.items() if "_k_bias" not in n})


def test_the_blend_starts_at_a_half_and_ends_at_the_backbone():
    model = tiny("t5")
    with torch.no_grad():  # attention takes another kernel where its table asks for a gradient
        plain = output(model, batch("t5"))
    delta = randomize(st.attach(model, SideTuning(reduction=4)))
    assert st.attach(tiny("t5"), SideTuning(reduction=4)).state()["decoder.top.side_tuning.blend"] == 0
    assert not torch.allclose(output(model, batch("t5")), plain, atol=1e-3)
    with torch.no_grad():
        delta.tensors()["decoder.top.side_tuning.blend"].fill_(100.0)
    assert torch.equal(output(model, batch("t5")), plain)


def test_a_full_copy_of_the_backbone_blends_into_itself():
    """r = 1, all blocks, maps in and out the identity: the side encoder and decoder are T5's own."""
    model = tiny("t5")
    plain = output(model, batch("t5")).detach()
    delta = st.attach(model, SideTuning(reduction=1, depth=2))
    with torch.no_grad():
        for name, p in delta.named_parameters():
            if name.rpartition(".")[2] in ("weight", "bias", "top", "top_bias", "weight_bias"):
                p.copy_(torch.eye(32) if p.dim() == 2 else torch.zeros(32))
    torch.testing.assert_close(output(model, batch("t5")), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("settings", "match"), [
    ({"depth": 3}, "more than the encoder has blocks"), ({"blocks": (0,)}, "Set depth"), ({"depth": 0}, "depth")])
def test_refusals(settings, match):
    with pytest.raises(MethodError, match=match):
        st.attach(tiny("bert"), SideTuning(reduction=4, **settings))


def test_count():
    d, w, f = 32, 8, 16
    whole = (d + 1) * w + 2 * (4 * (w + 1) * w + (w + 1) * f + (f + 1) * w + 4 * w) + (w + 1) * d + 2 * w + 1
    assert st.attach(tiny("bert"), SideTuning(reduction=4)).count().adapter == whole


def test_the_contract():
    """Two families here; `slimtune.testing.matrix` runs all."""
    assert issubclass(SideTuning, Side)
    assert set(check_method(SideTuning(reduction=4), ["gpt2", "bart"]).pairs) <= set(NAMES)
