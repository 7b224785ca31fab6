"""low_rank: two thin maps in place of one, as good as the singular values allow; their ranks are sliced as well."""
import pytest
import torch

import slimtune as st
from slimtune.sparsity.lowrank import low_rank
from slimtune.testing import batch, output, tiny


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_it_is_the_best_matrix_of_its_rank(family: str):
    """Eckart and Young: what is lost is the norm of the singular values that are cut."""
    model, old = tiny(family).double(), tiny(family).double()
    tower = st.dissect(model).towers[0].name
    lost = low_rank(model, {"mlp.up": 5, f"{tower}.1.mlp.up": 7, "mlp.down": 6})
    for site in st.dissect(old).sites:
        if site.role not in ("mlp.up", "mlp.down"):
            continue
        rank = 6 if site.role == "mlp.down" else (5, 7)[site.block or 0]
        new, was = model.get_submodule(site.path), old.get_submodule(site.path)
        weight = was.weight.mT if site.transposed else was.weight
        s = torch.linalg.svdvals(weight)
        assert lost[site.name] == pytest.approx(float(s[rank:].norm() / s.norm()))
        assert torch.linalg.matrix_rank(new.up.weight @ new.down.weight) == rank
        assert sum(p.numel() for p in new.parameters()) == rank * (site.d_in + site.d_out) + \
            (0 if was.bias is None else site.d_out)
        x = torch.randn(3, site.d_in, dtype=torch.double)
        torch.testing.assert_close((new(x) - was(x)).norm() <= s[rank] * x.norm(), torch.tensor(True))


@torch.no_grad()
def test_given_factors_are_taken_and_a_rank_of_zeros_is_sliced():
    model, old = tiny("bert"), tiny("bert")
    up, down = torch.randn(64, 4), torch.randn(4, 32)
    up[:, 1] = 0
    lost = low_rank(model, {"encoder.0.mlp.up": (up, down)})
    old.bert.encoder.layer[0].intermediate.dense.weight.copy_(up @ down)
    assert set(lost) == {"encoder.0.mlp.up"}
    report = st.shrink(model)
    assert report.ranks == {"bert.encoder.layer.0.intermediate.dense": 3}
    assert report.parameters == (report.parameters[1] + 64 + 32, report.parameters[1])
    torch.testing.assert_close(output(model, batch("bert")), output(old, batch("bert")))
    assert st.count_macs(model, 1).blocks["encoder.0"] == 4 * 32 * 32 + 3 * (64 + 32) + 64 * 32 + 2 * 32


def test_heads_and_neurons_are_cut_from_thin_maps_and_lora_goes_on_them():
    model = tiny("llama")
    low_rank(model, {"linear": 6})
    report = st.shrink(model, keep={"decoder.0.attn.heads": [1], "decoder.1.mlp.act": range(7)})
    assert report.difference < 1e-5
    assert report.heads["decoder.0.attn.heads"] == 1
    delta = st.attach(model, st.methods.LoRA(rank=2, sites=("linear",)))
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in delta.parameters())
    with pytest.raises(st.SlimtuneError, match="has no weight to merge into"):
        delta.merge()


@pytest.mark.parametrize(("family", "ranks", "message"), [
    ("bert", {"mlp.up": 22}, "Use 1 to 21"), ("bert", {"attn.k": 0}, "rank 0 saves nothing"),
    ("gpt2", {"attn.q": 4}, "no linear map of its own"), ("bert", {"mlp.act": 4}, "no linear map of its own"),
    ("t5", {"mlp.up": 4, "mlp.down": 4}, "t5 does not run with maps of low rank"),
    ("bert", {"mlp.up": (torch.ones(64, 2), torch.ones(3, 32))}, "Give up"), ("bert", {"mlp.op": 4}, "mlp.op")])
def test_a_refusal_leaves_the_model_as_it_was(family: str, ranks: dict, message: str):
    model = tiny(family)
    before = [*model.modules()], dict(model.named_parameters())
    with pytest.raises(st.SlimtuneError, match=message):
        low_rank(model, ranks)
    assert ([*model.modules()], dict(model.named_parameters())) == before or \
        all(a is b for a, b in zip([*model.modules()], before[0], strict=True))
