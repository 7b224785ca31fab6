"""The published counts, on the meta device: real sizes, no weights. The specs say which are reproduced."""
import pytest

import slimtune as st
from slimtune.testing import meta

M = st.methods
ALL = ("attn.?", "mlp.up", "mlp.gate", "mlp.down")

COUNTS = [
    # BERT-base: 12 blocks, d = 768, f = 3,072
    (meta.bert_base_meta, M.BitFit(), 102_912),
    (meta.bert_base_meta, M.BitFit(sites=("attn.q", "mlp.up")), 46_080),
    (meta.bert_base_meta, M.BitFit(sites=("mlp.up",)), 36_864),
    (meta.bert_base_meta, M.BitFit(sites=("attn.q",)), 9_216),
    (meta.bert_base_meta, M.LoRA(rank=8), 294_912),
    (meta.bert_base_meta, M.LoRA(rank=16), 589_824),
    (meta.bert_base_meta, M.Houlsby(bottleneck=64), 2_379_264),
    (meta.bert_base_meta, M.Houlsby(bottleneck=48), 1_789_056),
    (meta.bert_base_meta, M.Pfeiffer(bottleneck=48), 894_528),
    (meta.bert_base_meta, M.ParallelAdapter(bottleneck=384), 7_091_712),
    (meta.bert_base_meta, M.IA3(), 55_296),
    (meta.bert_base_meta, M.PrefixTuning(length=30), 552_960),
    (meta.bert_base_meta, M.PrefixTuning(length=30, hidden=512), 9_872_384),
    (meta.bert_base_meta, M.PrefixTuning(length=30, hidden=800), 15_402_272),
    (meta.bert_base_meta, M.NormTuning(), 38_400),
    # BERT-large, RoBERTa: without pooler
    (meta.bert_large_meta, M.BitFit(), 272_384),
    (meta.bert_large_meta, M.Houlsby(bottleneck=64), 6_343_680),
    (meta.roberta_base_meta, M.BitFit(), 102_144),
    (meta.roberta_base_meta, M.LoRA(rank=8), 294_912),
    (meta.roberta_large_meta, M.LoRA(rank=8), 786_432),  # the paper's 0.8M
    (meta.roberta_large_meta, M.PrefixTuning(length=128), 6_291_456),
    # T5-base: 36 attentions, 24 feed-forward networks
    (meta.t5_base_meta, M.LoRA(rank=8), 884_736),
    (meta.t5_base_meta, M.IA3(), 129_024),
    (meta.t5_base_meta, M.PrefixTuning(length=100), 5_529_600),
    (meta.t5_base_meta, M.PromptTuning(length=100), 76_800),
    (meta.t5_base_meta, M.Houlsby(bottleneck=48), 3_578_112),
    (meta.t5_xl_meta, M.IA3(), 540_672),
    (meta.t5_xl_meta, M.LoRA(rank=4, sites=ALL), 9_097_216 - 249_856),  # T-Few's LoRA, norms apart
    # BART-large: 36 attentions, 24 feed-forward networks, d = 1,024
    (meta.bart_large_meta, M.BitFit(), 333_824),
    (meta.bart_large_meta, M.PrefixTuning(length=200), 14_745_600),
    (meta.bart_large_meta, M.PrefixTuning(length=30, hidden=800), 61_608_288),
    (meta.bart_large_meta, M.ScaledParallelAdapter(bottleneck=512), 25_165_824 + 24 * (512 + 1024)),  # and biases
    (meta.bart_large_meta, M.PromptTuning(length=300), 307_200),
    # GPT-2 medium: 393,216 by the formula; the paper prints 0.35M
    (meta.gpt2_medium_meta, M.LoRA(rank=4), 393_216),
    # ViT-B/16
    (meta.vit_b16_meta, M.BitFit(), 102_912),
    (meta.vit_b16_meta, M.NormTuning(), 38_400),
    (meta.vit_b16_meta, M.Full(), 85_798_656),
]


@pytest.mark.parametrize(("backbone", "method", "numbers"), COUNTS)
def test_adapter(backbone, method, numbers: int):
    assert st.attach(backbone(), method).count().adapter == numbers


@pytest.mark.parametrize(("backbone", "numbers"), [
    (meta.bert_base_meta, 109_482_240), (meta.t5_base_meta, 222_903_552), (meta.vit_b16_meta, 85_798_656)])
def test_backbone(backbone, numbers: int):
    assert st.attach(backbone(), M.LoRA()).count().backbone == numbers


def test_norms_and_head_are_apart():
    count = st.attach(meta.bert_base_meta(num_labels=2), M.Houlsby()).count()
    assert (count.norms, count.head) == (38_400, 768 * 2 + 2)
    assert count.trainable == 2_379_264 + 38_400 + 1_538
    assert st.attach(meta.bert_large_meta(), M.Houlsby()).count().norms == 100_352
    assert st.attach(meta.t5_xl_meta(), M.LoRA(rank=4, sites=ALL, norms="all")).count().trainable == 9_097_216
    assert st.attach(meta.roberta_base_meta(num_labels=2), M.LoRA()).count().head == 592_130


def test_a_reparametrisation_is_not_stored():
    count = st.attach(meta.bert_base_meta(), M.PrefixTuning(length=30, hidden=512, head="none")).count()
    assert (count.trainable, count.stored) == (9_872_384, 552_960)
    assert st.attach(meta.bart_large_meta(), M.PrefixTuning(length=30, hidden=800)).count().stored == 2_211_840


@pytest.mark.parametrize("classes", [940, 1173])
def test_the_heads_of_vtab_and_fgvc(classes: int):
    count = st.attach(meta.vit_b16_meta(num_labels=classes), M.LinearProbe()).count()
    assert (count.adapter, count.head) == (0, classes * 769)
    assert 940 * 769 + 1173 * 769 == 1_624_897
