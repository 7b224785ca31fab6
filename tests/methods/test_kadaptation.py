"""KAdaptation against its paper: W <- W + s sum_i A_i (x) B_i, A_i = a_i b_i^T of all blocks, B_i = u_i v_i^T."""
import pytest
import torch
from merge_cases import check_merge

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, doubled, loss, output, randomize, site_io, tiny

KAdaptation = st.methods.KAdaptation


def mine(family: str, site: str, **values):
    p, x, y, out = site_io(st.attach(tiny(family).double(), KAdaptation(division=4, scale=3.0, **values)), site)
    tower, block, role = site.split(".", 2)
    keys = {"a": f"a_{tower}_{role.replace('.', '_')}", "b": f"b_{tower}_{role.replace('.', '_')}", "u": "u", "v": "v",
            "bias": f"bias_{tower}_{block}_{y.shape[-1]}"}
    return {n: p[key] for n, key in keys.items()}, x, y, out


def update(p):
    return sum(torch.kron(torch.outer(p["a"][i], p["b"][i]), torch.outer(p["u"][i], p["v"][i])) for i in range(4))


@pytest.mark.parametrize(("family", "site"), [
    ("vit", "vision.0.attn.q"), ("vit", "vision.0.attn.v"), ("clip", "vision.0.attn.v"), ("clip", "text.0.attn.q"),
    ("gpt2", "decoder.0.attn.v"), ("llama", "decoder.0.attn.v"), ("t5", "decoder.0.cross.attn.q")])
def test_equation(family: str, site: str):
    sites = ("cross.attn.q",) if "cross" in site else ("attn.q", "attn.v")
    p, x, y, out = mine(family, site, sites=sites)
    assert_equation(out, y + 3.0 * x @ update(p) + p["bias"], p)
    assert torch.linalg.matrix_rank(update(p)) <= 4


@pytest.mark.parametrize("role", ["attn.q", "attn.v"])
def test_the_code_adds_to_the_query_behind_its_division(role: str):
    p, x, y, out = mine("vit", f"vision.0.{role}", compat="official")
    c = 8**-0.5 if role == "attn.q" else 1.0
    assert_equation(c * out, c * y + 3.0 * x @ update(p) + p["bias"], p)


def test_what_it_trains():
    """Slow factors once a role, one bias for both projections of a block, fast factors a site."""
    delta = st.attach(tiny("vit"), KAdaptation(division=4, head="none"))
    assert set(delta.state()) == {f"shared.kadaptation.{n}_vision_attn_{r}" for n in "ab" for r in "qv"} | {
        f"shared.kadaptation.bias_vision_{i}_32" for i in (0, 1)} | {
        f"vision.{i}.attn.{r}.kadaptation.{n}" for i in (0, 1) for r in "qv" for n in "uv"}
    slow = [slot.bind(torch.zeros(1)).values["a_vision_attn_q"] for _, slot in delta.slots]
    assert all(a is slow[0] for a in slow)
    assert delta.count().adapter == 2 * (4 * 32 + 32) + 4 * 4 * 4


def moving(compat: str) -> list[set[str]]:
    """What has a gradient other than 0 at the first two steps."""
    model, found = tiny("vit"), []
    delta = st.attach(model, KAdaptation(division=4, compat=compat))
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch("vit")).backward()
        found.append({n for n, p in delta.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    return found


def test_the_codes_start_never_moves_and_the_corrected_one_does():
    """Both fast factors at 0: the product's gradient is 0 through either. Ours starts u at random."""
    state = st.attach(tiny("vit"), KAdaptation(division=4)).state()
    every = set(state)
    still = {n for n in every if not (n.startswith("head") or ".bias_" in n)}
    assert moving("official") == [every - still] * 2
    first, second = moving("paper")
    assert first == (every - still) | {n for n in still if n.endswith(".v")}
    assert second == every
    slow = torch.cat([v.flatten() for n, v in state.items() if n.startswith("shared") and ".bias_" not in n])
    assert 0.009 < slow.abs().max() <= 0.01


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_it_starts_as_an_identity(compat: str):
    model, inputs = tiny("vit"), batch("vit")
    before = output(model, inputs)
    st.attach(model, KAdaptation(division=4, compat=compat))
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("family", ["vit", "gpt2", "llama", "t5"])
def test_merged_is_unmerged(family: str, compat: str):
    """Where a projection has no bias (Llama, T5), the merged one gets it."""
    model = tiny(family).double()
    inputs = doubled(batch(family))
    delta = randomize(st.attach(model, KAdaptation(division=4, scale=2.0, compat=compat)))
    check_merge(delta, inputs)


def test_a_division_must_divide():
    with pytest.raises(MethodError, match=r"(?s)vision\.0\.attn\.q \(32 -> 32\).*Choose one of 1 2 4 8 16 32"):
        st.attach(tiny("vit"), KAdaptation(division=12))
