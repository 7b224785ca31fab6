"""DSEE against its paper: y + (alpha / r) (B A + S2) x, S2 on a support that is found once and stored."""
import pytest
import torch
from example_axes import assert_example_axes

import slimtune as st
from slimtune.core.support import largest, residual
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, meta, randomize, site_io, tiny

M = st.methods
SMALL = {"rank": 3, "alpha": 6.0, "nonzero": 7, "outer": 2}


@pytest.mark.parametrize(("family", "site"), [
    ("bert", "encoder.1.attn.q"), ("gpt2", "decoder.0.attn.v"), ("t5", "decoder.1.cross.attn.v")])
def test_equation(family: str, site: str):
    p, x, y, out = site_io(st.attach(tiny(family).double(), M.DSEE(**SMALL)), site)
    trained = {n: t for n, t in p.items() if t.requires_grad}
    S = sum(v * torch.eye(32 * 32, dtype=torch.float64)[i] for i, v in zip(p["indices"], p["values"], strict=True))
    assert_equation(out, y + 2.0 * x @ (p["B"] @ p["A"] + S.view(32, 32)).T, trained)
    assert sorted(trained) == ["A", "B", "values"]


def test_the_merged_weight():
    model = tiny("bert").double()
    value = model.bert.encoder.layer[1].attention.self.value
    weight = value.weight.detach().clone()
    delta = randomize(st.attach(model, M.DSEE(**SMALL)))
    p = {n: delta.state()[f"encoder.1.attn.v.dsee.{n}"] for n in ("A", "B", "indices", "values")}
    delta.merge()
    weight += 2.0 * p["B"] @ p["A"]
    for i, v in zip(p["indices"].tolist(), p["values"], strict=True):
        weight[i // 32, i % 32] += 2.0 * v
    torch.testing.assert_close(value.weight.detach(), weight)


def test_an_example_has_its_own_values():
    assert_example_axes(M.DSEE(**SMALL))


def test_the_support_is_of_the_sites_own_weight():
    model = tiny("gpt2")
    delta = st.attach(model, M.DSEE(support="magnitude", nonzero=7))
    for block, layer in enumerate(model.transformer.h):  # c_attn is (in, 3 out): queries, keys, values
        for start, role in ((0, "q"), (64, "v")):
            weight = layer.attn.c_attn.weight[:, start:start + 32].T
            smallest_kept = weight.abs().flatten().sort().values[-7]
            wanted = (weight.abs().flatten() >= smallest_kept).nonzero().flatten()
            assert delta.state()[f"decoder.{block}.attn.{role}.dsee.indices"].tolist() == wanted.tolist()


@pytest.mark.parametrize("support", ["grebsmo", "magnitude", "random"])
def test_each_support_is_n_entries(support):
    weight, method = tiny("bert").bert.encoder.layer[0].attention.self.query.weight, M.DSEE(support=support, **SMALL)
    chosen = method._support(weight, torch.Generator().manual_seed(3))
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    scores = {"magnitude": weight, "random": noise,
              "grebsmo": residual(weight, torch.Generator().manual_seed(3), 2, 2, 5, 0.01)}[support]
    assert chosen.tolist() == largest(scores.abs(), 7).tolist()


def test_a_saved_delta_brings_its_support(tmp_path, monkeypatch):
    delta = st.attach(tiny("bert"), M.DSEE(**SMALL))
    delta.save(tmp_path / "delta")
    monkeypatch.setattr(M.DSEE, "_support", lambda *_: pytest.fail("found once more"))
    loaded = st.load(tiny("bert"), tmp_path / "delta")
    name = "encoder.1.attn.v.dsee.indices"
    assert torch.equal(loaded.state()[name], delta.state()[name])
    assert loaded.state()[name].dtype == torch.int32


def test_too_few_entries_are_refused():
    with pytest.raises(MethodError, match=r"20 rounds on a 32 x 32 weight leave 0 entries.*rank 96.*nonzero=64"):
        st.attach(tiny("bert"), M.DSEE())
    with pytest.raises(MethodError, match=r"leave 0 entries of at least 9\.0"):
        st.attach(tiny("bert"), M.DSEE(outer=1, threshold=9.0))
    with pytest.raises(MethodError, match=r"nonzero=1025 is more than the 32 x 32 entries of encoder\.0\.attn\.q"):
        st.attach(tiny("bert"), M.DSEE(nonzero=1025, support="magnitude"))


@pytest.mark.parametrize("site", ["attn", "mlp", "block", "norm.attn", "mlp.act"])
def test_a_site_that_is_no_linear_map_is_refused(site):
    with pytest.raises(MethodError, match="works on the weight of a linear map"):
        st.attach(tiny("bert"), M.DSEE(sites=(site,), support="magnitude", nonzero=4))


@pytest.mark.parametrize("nonzero", [16, 64, 128])
def test_count(nonzero: int):
    count = st.attach(meta.bert_base_meta(num_labels=2), M.DSEE(nonzero=nonzero)).count()
    assert (count.adapter, count.norms, count.head) == (589_824 + 24 * nonzero, 0, 1_538)
    assert count.stored == count.trainable + 24 * nonzero  # and an index for each value
