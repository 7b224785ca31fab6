"""How shrink tells that what it sliced computes the same: its report, its batch, and its limits."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.lowrank import low_rank
from slimtune.sparsity.shrink import _compare
from slimtune.testing import batch, tiny
from slimtune.testing.case import outline


def test_the_report_says_for_how_many_tokens():
    report = st.shrink(tiny("bert"), keep={"encoder.0.mlp.act": range(32)})
    before, after = st.count_macs(tiny("bert"), 128).total, st.count_macs(tiny("bert"), 128, None, [32, 64]).total
    assert report.macs == (before, after)
    assert f"MACs of 128 tokens {before:,} -> {after:,}" in str(report)


def test_a_model_that_does_not_run_on_a_random_batch():
    """Of multiple choice, a text has a choice for a dimension."""
    from transformers import BertConfig, BertForMultipleChoice
    model = BertForMultipleChoice(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
                                             intermediate_size=64)).eval()
    before = outline(model)
    for cut in (lambda: st.shrink(model, keep={"encoder.0.mlp.act": range(9)}),
                lambda: low_rank(model, {"mlp.up": 3})):
        with pytest.raises(MethodError, match=r"(?s)MultipleChoice does not run on .* RuntimeError.*Pass inputs="):
            cut()
        assert outline(model) == before
    inputs = {"input_ids": torch.arange(24).view(2, 3, 4)}
    assert st.shrink(model, keep={"encoder.0.mlp.act": range(9)}, inputs=inputs).difference <= 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "bert", "bart"])
def test_a_loss_of_bfloat16_is_as_exact_as_its_logits(family: str):
    """Losses are float32 in any model; their rounding is that of what they were computed of."""
    inputs, model = batch(family), tiny(family).bfloat16()
    assert model(**inputs).loss.dtype == (torch.bfloat16 if family in ("bert", "bart") else torch.float32)
    tower = st.dissect(model).towers[0].name
    keep = {f"{tower}.0.mlp.act": range(20)} | ({} if family == "bart" else {f"{tower}.hidden": range(20)})
    assert st.shrink(model, keep=keep, inputs=inputs).difference <= 16 * torch.finfo(torch.bfloat16).eps
    assert st.shrink(tiny(family), keep=keep, inputs=inputs).difference <= 1e-5


def test_a_small_loss_is_told_by_the_scale_of_its_logits():
    """Of logits of 100, float32 leaves a loss 1e-5 of noise, however near 0 it is; logits that differ are told."""
    told = {"loss": torch.tensor(1e-4), "logits": torch.tensor([[100.0, 90.0]])}
    off = {"loss": torch.tensor(1.1e-4), "logits": told["logits"] + 1e-5}
    assert _compare(told, off, tiny("bert"), "bert", None) < 1e-6
    for wrong in ({"logits": told["logits"] * 1.001}, {"loss": torch.tensor(1.0)}):
        with pytest.raises(MethodError, match="differs from the gated one"):
            _compare(told, {**told, **wrong}, tiny("bert"), "bert", None)
    with pytest.raises(MethodError, match=r"logits by 2\.0e-01"):
        _compare(told, {**told, "logits": told["logits"] * 1.2}, tiny("bert").bfloat16(), "bert", None)
