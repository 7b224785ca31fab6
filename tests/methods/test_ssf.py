"""SSF against its paper: y <- gamma * y + beta behind every linear map and norm, and merged into what is before it."""
import pytest
import torch
import torch.nn.functional as F
from merge_cases import check_merge

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, doubled, output, randomize, site_io, tiny

SSF = st.methods.SSF


def inputs_of(family: str):
    return doubled(batch(family))


@pytest.mark.parametrize(("family", "site"), [
    ("vit", "vision.0.attn.q"), ("vit", "vision.1.norm.mlp"), ("vit", "vision.norm.final"), ("vit", "vision.embed"),
    ("bert", "encoder.1.mlp.down"), ("bert", "encoder.embed"), ("gpt2", "decoder.1.attn.v"),
    ("t5", "encoder.0.norm.attn")])
def test_equation(family: str, site: str):
    p, _, y, out = site_io(st.attach(tiny(family).double(), SSF()), site)
    if y.dim() == 4:  # patches: channels come first there
        y, out = y.movedim(1, -1), out.movedim(1, -1)
    assert_equation(out, y * p["gamma"] + p["beta"], p)


def test_the_whole_vit_in_plain_hooks():
    model, inputs = tiny("vit").double(), inputs_of("vit")
    delta = randomize(st.attach(model, SSF(head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    block = {"attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
             "attention.o_proj": "attn.o", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down", "layernorm_before": "norm.attn",
             "layernorm_after": "norm.mlp"}
    places = {f"vit.layers.{i}.{path}": f"vision.{i}.{role}" for i in (0, 1) for path, role in block.items()}
    places |= {"vit.layernorm": "vision.norm.final", "vit.embeddings.patch_embeddings.projection": "vision.embed"}
    assert len(state) == 2 * len(places)
    for path, site in places.items():
        gamma, beta = state[f"{site}.ssf.gamma"], state[f"{site}.ssf.beta"]
        if site == "vision.embed":
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        model.get_submodule(path).register_forward_hook(lambda m, a, y, g=gamma, b=beta: y * g + b)
    torch.testing.assert_close(output(model, inputs), own)


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2", "clip"])
def test_merged_is_unmerged(family: str):
    """Linear maps, norms, tables of words, convolutions of patches (CLIP's without a bias)."""
    model, inputs = tiny(family).double(), inputs_of(family)
    delta = randomize(st.attach(model, SSF(head="none" if family == "clip" else "train")))
    check_merge(delta, inputs)


def test_the_merged_patches():
    model, inputs = tiny("vit").double(), inputs_of("vit")
    delta = randomize(st.attach(model, SSF(sites=("embed",))))
    conv, p = model.vit.embeddings.patch_embeddings.projection, {n: v.clone() for n, v in delta.state().items()}
    gamma, beta = p["vision.embed.ssf.gamma"], p["vision.embed.ssf.beta"]
    wanted = gamma[:, None, None] * F.conv2d(inputs["pixel_values"], conv.weight, conv.bias, 4) + beta[:, None, None]
    delta.merge()
    torch.testing.assert_close(conv(inputs["pixel_values"]), wanted)


def test_a_norm_without_a_bias_cannot_take_beta():
    delta = st.attach(tiny("t5"), SSF())
    with pytest.raises(MethodError, match=r"(?s)norm has no bias.*leave the norms out"):
        delta.merge()
    rest = randomize(st.attach(tiny("t5").double(), SSF(sites=("embed", "linear"))))
    own = output(rest.model, batch("t5"))
    rest.merge()
    torch.testing.assert_close(output(rest.model, batch("t5")), own)


def test_what_it_trains_and_where_it_starts():
    delta = st.attach(tiny("vit", hidden_size=512), SSF(head="none"))
    gamma, beta = (torch.cat([v for n, v in delta.state().items() if n.endswith(end)]) for end in ("gamma", "beta"))
    for values, mean in ((gamma, 1.0), (beta, 0.0)):
        assert abs(values.mean() - mean) < 1e-3
        assert 0.019 < values.std() < 0.021
    assert delta.count().adapter == 2 * (2 * (7 * 512 + 64) + 2 * 512)
