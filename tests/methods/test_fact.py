"""FacT against its paper: Delta W_i = s U Sigma_i V^T for each d x d slice; Sigma_i its own, or sum_t P_it C_t."""
import pytest
import torch
import torch.nn.functional as F
from merge_cases import check_merge

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, doubled, output, randomize, site_io, tiny

FacT = st.methods.FacT
SITES = [("vit", "vision.0.attn.q"), ("vit", "vision.0.mlp.up"), ("vit", "vision.0.mlp.down"),
         ("gpt2", "decoder.0.attn.q"), ("bert", "encoder.0.mlp.up"), ("llama", "decoder.0.attn.v")]


def mine(family: str, site: str, **values):
    """The tensors and the doing of one site, which is the only one: it shares with no other."""
    method = FacT(rank=3, scale=2.0, blocks=(0,), sites=(site.partition(".0.")[2],), **values)
    p, x, y, out = site_io(st.attach(tiny(family).double(), method), site)
    return {n.split("_")[0]: t for n, t in p.items()}, x, y, out


def sigma(p, i: int):
    return p["core"][i] if "core" in p else sum(p["P"][i, t] * p["C"][t] for t in range(3))


def update(p, i: int):
    """Delta W_i of row vectors, by the sum of the paper."""
    return 2.0 * p["U"].T @ sigma(p, i) @ p["V"].T


def sliced(x, y, maps):
    """y + x Delta W: one slice for each piece of the output, or of the input."""
    if y.shape[-1] > x.shape[-1]:
        return y + torch.cat([x @ m for m in maps], -1)
    return y + sum(piece @ m for piece, m in zip(x.chunk(len(maps), -1), maps, strict=True))


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize(("family", "site"), SITES)
def test_equation(family: str, site: str, form: str):
    p, x, y, out = mine(family, site, form=form)
    slices = max(x.shape[-1], y.shape[-1]) // min(x.shape[-1], y.shape[-1])
    assert slices == len(p.get("core", p.get("P"))) == (1 if "attn.q" in site else 2)
    assert_equation(out, sliced(x, y, [update(p, i) for i in range(slices)]), p)


@pytest.mark.parametrize("role", ["attn.q", "mlp.up", "mlp.down"])
def test_the_codes_layout_of_the_tucker_core(role: str):
    """The code cuts (r, r, slices), laid out as (r, slices r), into blocks; for fc2 it transposes that."""
    p, x, y, out = mine("vit", f"vision.0.{role}", form="tk", compat="official")
    n, r = len(p["P"]), 3
    flat = [[None] * (n * r) for _ in range(r)]
    for a in range(r):
        for b in range(r):
            for i in range(n):
                flat[a][n * b + i] = sum(p["C"][t, a, b] * p["P"][i, t] for t in range(r))
    M = torch.stack([torch.stack(row) for row in flat])
    if role == "mlp.down":
        z = torch.cat([piece @ p["U"].T for piece in x.chunk(n, -1)], -1)
        wanted = y + 2.0 * z @ M.T @ p["V"].T
    else:
        wanted = y + 2.0 * torch.cat([h @ p["V"].T for h in (x @ p["U"].T @ M).chunk(n, -1)], -1)
    assert_equation(out, wanted, p)
    own = sliced(x, y, [update(p, i) for i in range(n)])
    assert torch.allclose(own, wanted) == (role == "attn.q")  # attention is as in the paper


def test_tucker_is_the_tensor_train_with_its_slices():
    """Sigma_i = sum_t P_it C_t."""
    outs = []
    inputs = doubled(batch("vit"))
    for form in ("tk", "tt"):
        model = tiny("vit").double()
        delta = randomize(st.attach(model, FacT(form=form, rank=3)))
        if form == "tk":
            tucker = delta.state()
        else:
            C = tucker["shared.fact.C_vision_32"]
            cores = {n.removesuffix("P") + "core": torch.einsum("it,tab->iab", v, C)
                     for n, v in tucker.items() if n.endswith(".P")}
            delta.load_state({n: cores.get(n, tucker.get(n)) for n in delta.state()})
        outs.append(output(model, inputs))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("family", ["vit", "gpt2", "bert", "llama"])
def test_merged_is_unmerged(family: str, form: str, compat: str):
    model = tiny(family).double()
    inputs = doubled(batch(family))
    delta = randomize(st.attach(model, FacT(form=form, rank=3, scale=0.5, compat=compat, head="none")))
    check_merge(delta, inputs)


def test_what_it_trains():
    """U and V once a tower and width, in memory and in what is saved; V = 0, so it starts as an identity."""
    model, inputs = tiny("vit"), batch("vit")
    before = output(model, inputs)
    delta = st.attach(model, FacT(form="tk", rank=3, head="none"))
    assert torch.equal(output(model, inputs), before)
    names = list(delta.state())
    assert [n for n in names if "U_" in n or "V_" in n or "C_" in n] == [
        f"shared.fact.{n}_vision_32" for n in ("U", "V", "C")]
    assert {n for n in names if n.endswith(".P")} == {
        f"vision.{i}.{role}.fact.P" for i in (0, 1) for role in
        ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")}
    used = [slot.bind(torch.zeros(1)).values["U_vision_32"] for _, slot in delta.slots]
    assert all(u is used[0] for u in used)
    stages = {n for n in st.attach(tiny("swin"), FacT(rank=3)).state() if n.startswith("shared")}
    assert stages == {f"shared.fact.{n}_vision_{d}" for n in "UV" for d in (16, 32)}


def test_the_start_is_the_codes():
    """U and the slices as `nn.Linear`, C as an (r, r, r) tensor, P as (r, all slices)."""
    state = st.attach(tiny("vit"), FacT(form="tk", rank=8)).state()
    for name, bound in (("shared.fact.U_vision_32", 32**-0.5), ("shared.fact.C_vision_32", 3**0.5 / 8),
                        ("vision.0.mlp.up.fact.P", (6 / (8 + 2 * 8))**0.5)):
        assert 0.7 * bound < state[name].abs().max() <= bound
    core = st.attach(tiny("vit"), FacT(rank=8)).state()["vision.0.attn.q.fact.core"]
    assert 0.7 * 8**-0.5 < core.abs().max() <= 8**-0.5


@pytest.mark.parametrize("role", ["attn.q", "mlp.up", "mlp.down"])
def test_dropout_stands_before_v(role: str):
    """In evaluation it is off; in training it is on x U Sigma, a mask for all slices at once."""
    model, inputs = tiny("vit").double(), batch("vit")["pixel_values"].double()
    seen: dict[str, torch.Tensor] = {}
    delta = randomize(st.attach(model, FacT(rank=3, dropout=0.5, scale=2.0, blocks=(0,), sites=(role,), head="none")))
    slot = delta.slots[0][1]
    host = model.get_submodule(slot.site.path)
    host.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach()))
    host.register_forward_hook(lambda m, a, out: seen.update(out=out.detach()))
    model(inputs)
    quiet = seen["out"]
    p = {n.split("_")[0].rpartition(".")[2]: v for n, v in delta.state().items()}
    y = host.forward(seen["x"])
    x, maps = seen["x"], [p["U"].T @ core for core in p["core"]]
    torch.testing.assert_close(quiet, sliced(x, y, [2.0 * m @ p["V"].T for m in maps]))
    h = torch.cat([x @ m for m in maps], -1) if role != "mlp.down" else sliced(x, 0 * x[..., :3], maps)
    model.train()
    torch.manual_seed(7)
    model(inputs)
    torch.manual_seed(7)
    dropped = F.dropout(h, 0.5).chunk(len(maps) if role != "mlp.down" else 1, -1)
    torch.testing.assert_close(seen["out"], y + 2.0 * torch.cat([d @ p["V"].T for d in dropped], -1))
    assert not torch.allclose(seen["out"], quiet)


def test_a_map_without_square_slices_is_refused():
    with pytest.raises(MethodError, match=r"(?s)encoder\.0\.mlp\.up \(32 -> 48\).*Leave it out"):
        st.attach(tiny("bert", intermediate_size=48), FacT())
