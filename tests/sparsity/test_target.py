"""Targets and their denominators: what a sparsity is a share of."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError, SiteError
from slimtune.sparsity.allocation import removed
from slimtune.sparsity.target import denominator, targets
from slimtune.testing import bert_base_meta, bert_large_meta, tiny


def count(found):
    return sum(t.parameter.numel() for t in found.values())


def test_denominators_of_the_papers():
    delta = st.attach(bert_base_meta(), st.methods.LoRA(rank=4))
    assert count(targets(delta, "base")) == 84_934_656
    assert count(targets(delta, "base", pooler=True)) == 85_524_480
    assert count(targets(delta, "both")) == 84_934_656 + 12 * 2 * 2 * 4 * 768
    assert count(targets(st.attach(bert_large_meta(), st.methods.LoRA(rank=4)), "base")) == 301_989_888
    assert [denominator("base"), denominator("base", True), denominator("both"), denominator("delta")] == [
        "base", "base+pooler", "delta+base", "delta"]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.2, 68_419_584), (0.3, 59_867_136), (0.4, 51_314_688)])
def test_robust_tickets_keep(sparsity, kept):
    """Of 85,524,480. The spec's 59,867,135 of 30 % is int(0.7 * n), whose product falls below a whole number."""
    assert 85_524_480 - removed(sparsity, 85_524_480) == kept
    assert int(0.7 * 85_524_480) == 59_867_135


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_sparse_adapters_denominator(times):
    delta = st.attach(bert_base_meta(), st.methods.Houlsby(bottleneck=64 * times))
    total = count(targets(delta))
    assert total == 2_359_296 * times
    assert total - removed(1 - 1 / times, total) == 2_359_296  # Large-Sparse keeps as many
    if times == 1:
        assert [total - removed(0.4, total, rule) for rule in ("floor", "ceil")] == [1_415_578, 1_415_577]


def test_a_delta_is_its_matrices():
    delta = st.attach(tiny("bert"), st.methods.Houlsby(bottleneck=4, norms="all"))
    assert {n.rpartition(".")[2] for n in targets(delta)} == {"down", "up"}
    compacter = targets(st.attach(tiny("bert"), st.methods.Compacter(bottleneck=4, division=2)))
    assert any(n.startswith("shared.") for n in compacter)
    assert all(t.parameter.dim() > 1 for t in compacter.values())


def test_a_fused_projection_is_one_target_and_a_trained_weight_is_the_deltas():
    delta = st.attach(tiny("gpt2"), st.methods.LoRA(rank=2))
    base = targets(delta, "base")
    fused = base["own.transformer.h.0.attn.c_attn.weight"]
    assert fused.transposed
    assert [s.role for s in fused.sites] == ["attn.q", "attn.k", "attn.v"]
    assert len(base) == 8
    full = st.attach(tiny("bert"), st.methods.Full())
    assert all(t.parameter is full.tensors()[n] for n, t in targets(full, "base").items())


def test_sites_and_blocks_choose():
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    assert list(targets(delta, "base", sites=("mlp.up",), blocks=[-1])) == [
        "own.bert.encoder.layer.1.intermediate.dense.weight"]
    with pytest.raises(SiteError, match="no linear map"):
        targets(delta, "base", sites=("norm.attn",))
    with pytest.raises(SiteError, match="no pooler"):
        targets(st.attach(tiny("llama"), st.methods.LoRA(rank=2)), "base", pooler=True)
    with pytest.raises(MethodError, match="Gates"):
        targets(delta, "gates")
    with pytest.raises(MethodError, match="on='base'"):
        targets(st.attach(tiny("bert"), st.methods.BitFit()))


def test_a_masked_weight_is_seen_as_it_acts():
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    name = "own.bert.encoder.layer.0.output.dense.weight"
    mask = torch.rand(32, 64) > 0.5
    delta.set_masks({name: mask})
    assert torch.equal(targets(delta, "base")[name].parameter == 0, ~mask)
