"""TARP against its paper: y = [Phi1 * W0 + Phi2] x + b, with the matrices made for every token."""
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from example_axes import assert_example_axes

import slimtune as st
from slimtune.errors import MethodError, SlimtuneError
from slimtune.testing import assert_equation, batch, meta, output, randomize, site_io, tiny

M = st.methods
BRANCHES = [(True, False), (False, True), (True, True)]
SETTINGS = [dict(zip(("form", "sigma", "init", "compat"), values, strict=True)) for values in product(
    ("dynamic", "bilinear", "kronecker"), ("full", "diag"), ("paper", "identity"), ("paper", "official"))
    if values[0] == "dynamic" or values[1] == "full"]


def phi(p, branch: str, x, settings) -> torch.Tensor:
    """Phi of every token, (..., T, d_out, d_in), or of all."""
    U, V, r = p[f"{branch}_U"], p[f"{branch}_V"], p[f"{branch}_V"].shape[-2]
    if settings["form"] == "kronecker":
        return sum(torch.kron(h, u @ v) for h, u, v in zip(p[f"{branch}_H"], U, V, strict=True))
    if f"{branch}_F" not in p:
        return U @ V
    flat = x @ p[f"{branch}_F"].T
    return U @ (flat.view(*x.shape[:-1], r, r) if settings["sigma"] == "full" else torch.diag_embed(flat)) @ V


def equation(p, x, weight, bias, settings, additive: bool, multiplicative: bool) -> torch.Tensor:
    phi1, phi2 = torch.ones_like(weight), torch.zeros_like(weight)
    if additive:
        phi2 = phi(p, "shift", x, settings)
    if multiplicative:
        phi1 = phi(p, "scale", x, settings)
        official, identity = settings["compat"] == "official", settings["init"] == "identity"
        if official:
            phi1 = F.softplus(phi1 + (math.log(math.e - 1) if identity else 0))
        elif identity:
            phi1 = 1 + phi1
    return ((phi1 * weight + phi2) @ x[..., None])[..., 0] + bias


@pytest.mark.parametrize(("additive", "multiplicative"), BRANCHES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_equation(settings, additive: bool, multiplicative: bool):
    model = tiny("bert").double()
    delta = st.attach(model, M.TARP(rank=3, additive=additive, multiplicative=multiplicative, **settings))
    p, x, _, out = site_io(delta, "encoder.0.mlp.up")
    up = model.bert.encoder.layer[0].intermediate.dense
    assert_equation(out, equation(p, x, up.weight, up.bias, settings, additive, multiplicative), p)


def test_equation_in_a_slice_of_a_fused_projection():
    model, settings = tiny("gpt2").double(), {"form": "dynamic", "sigma": "full", "init": "paper", "compat": "paper"}
    p, x, _, out = site_io(st.attach(model, M.TARP(rank=3, multiplicative=True)), "decoder.0.attn.v")
    fused = model.transformer.h[0].attn.c_attn  # (in, 3 out): queries, keys, values
    assert_equation(out, equation(p, x, fused.weight.T[64:], fused.bias[64:], settings, True, True), p)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_every_parameter_may_have_an_example_axis(settings):
    assert_example_axes(M.TARP(rank=2, multiplicative=True, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_it_starts_as_it_says(settings):
    method, inputs = M.TARP(rank=2, multiplicative=True, **settings), batch("bert")
    plain, model = output(tiny("bert"), inputs), tiny("bert")
    st.attach(model, method)
    assert torch.equal(output(model, inputs), plain) == (settings["init"] == "identity") == method.starts_as_identity()


@pytest.mark.parametrize(("additive", "multiplicative"), BRANCHES)
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["sigma"] == "full"], ids=lambda s: "-".join(s.values()))
def test_what_is_static_is_merged(settings, additive: bool, multiplicative: bool):
    model, inputs = tiny("gpt2").double(), batch("gpt2")
    delta = randomize(st.attach(model, M.TARP(rank=2, additive=additive, multiplicative=multiplicative, **settings)))
    if settings["form"] == "dynamic" and (additive or settings["compat"] == "paper"):
        with pytest.raises(MethodError, match="not linear"):
            delta.merge()
        return
    own = output(model, inputs)
    delta.merge()
    torch.testing.assert_close(output(model, inputs), own)


def test_errors_say_what_to_do():
    with pytest.raises(SlimtuneError, match="trains neither branch"):
        st.attach(tiny("bert"), M.TARP(additive=False))
    with pytest.raises(SlimtuneError, match=r"division=5 divides not both widths of encoder\.0\.attn\.q, 32 and 32"):
        st.attach(tiny("bert"), M.TARP(form="kronecker", division=5))


def sites(d: int, f: int) -> list[tuple[int, int]]:
    return [(d, d)] * 4 + [(d, f), (f, d)]


@pytest.mark.parametrize(("backbone", "blocks", "widths", "rank"), [
    (meta.roberta_base_meta, 12, sites(768, 3072), 8), (meta.gpt2_medium_meta, 24, sites(1024, 4096), 4)])
def test_count(backbone, blocks: int, widths, rank: int):
    low = blocks * sum(rank * (i + o) for i, o in widths)
    full, diag = (blocks * sum(i * n for i, _ in widths) for n in (rank**2, rank))
    counts = {M.TARP(rank=rank): low + full, M.TARP(rank=rank, sigma="diag"): low + diag,
              M.TARP(rank=rank, multiplicative=True): 2 * (low + full),
              M.TARP(rank=rank, multiplicative=True, compat="official"): 2 * low + full,
              M.TARP(rank=rank, form="bilinear"): low,
              M.TARP(rank=rank, form="kronecker", division=4): low + blocks * 6 * 4**3}
    model = backbone()
    for number, (method, wanted) in enumerate(counts.items()):
        assert st.attach(model, method, f"d{number}").count().adapter == wanted, method
    if rank == 8:
        assert low + full == 6_635_520
