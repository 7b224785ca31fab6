"""The published counts, on the meta device: real sizes, no weights. docs/not-reproduced.md has those that fail."""
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import nn

import slimtune as st
from slimtune.core import Count, Method
from slimtune.testing import meta

M = st.methods
ALL = ("attn.?", "mlp.up", "mlp.gate", "mlp.down")
FFN = ("mlp.up", "mlp.down")
Backbone = Callable[..., nn.Module]


@cache
def model(backbone: Backbone, values: tuple[tuple[str, int], ...]) -> nn.Module:
    return backbone(**dict(values))


def count(backbone: Backbone, method: Method, **values: Any) -> Count:
    delta = st.attach(model(backbone, tuple(values.items())), method)
    try:
        return delta.count()
    finally:
        delta.detach()


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
    (meta.bert_base_meta, M.Compacter(), 57_088),  # the paper's modules on BERT, norms apart
    (meta.bert_base_meta, M.CompacterPlusPlus(), 28_576),
    (meta.bert_base_meta, M.PTuningV2(length=20), 368_640),  # arXiv 2110.07602: 2 l d an attention
    (meta.bert_base_meta, M.MultiHeadParallelAdapter(bottleneck=30), 552_960),  # as a prefix of 30
    (meta.bert_base_meta, M.MAM(hidden=800, bottleneck=384), 22_493_984),  # AdapterHub's MAM configuration
    # BERT-large, RoBERTa: without pooler
    (meta.bert_large_meta, M.BitFit(), 272_384),
    (meta.bert_large_meta, M.Houlsby(bottleneck=64), 6_343_680),
    (meta.bert_large_meta, M.LoRA(rank=4), 393_216),  # arXiv 2205.00305, table 1: 0.39M
    (meta.roberta_base_meta, M.BitFit(), 102_144),
    (meta.roberta_base_meta, M.LoRA(rank=8), 294_912),
    (meta.roberta_large_meta, M.LoRA(rank=8), 786_432),  # the paper's 0.8M
    (meta.roberta_large_meta, M.PrefixTuning(length=128), 6_291_456),
    (meta.roberta_large_meta, M.PTuningV2(length=128), 6_291_456),  # arXiv 2110.07602, its RTE script
    # T5-base: 36 attentions, 24 feed-forward networks
    (meta.t5_base_meta, M.LoRA(rank=8), 884_736),
    (meta.t5_base_meta, M.IA3(), 129_024),
    (meta.t5_base_meta, M.PrefixTuning(length=100), 5_529_600),
    (meta.t5_base_meta, M.PromptTuning(length=100), 76_800),
    (meta.t5_base_meta, M.Houlsby(bottleneck=48), 3_578_112),
    (meta.t5_xl_meta, M.IA3(), 540_672),
    (meta.t5_xl_meta, M.LoRA(rank=4, sites=ALL), 9_097_216 - 249_856),  # T-Few's LoRA, norms apart
    (meta.bart_large_meta, M.BitFit(), 333_824),
    (meta.bart_large_meta, M.PromptTuning(length=300), 307_200),
    # RoBERTa-base, from the issues of arXiv 2110.04366's code: 46,783,200 = 3 P + 2 A, and 16,000,160 = P + 2 A
    (meta.roberta_base_meta, M.PrefixTuning(length=16, hidden=800), 15_391_520),  # P
    (meta.roberta_base_meta, M.ScaledParallelAdapter(bottleneck=16), 304_320),  # A
    (meta.roberta_base_meta, M.MAM(length=16, bottleneck=16), 589_824 + 12 * (16 + 768)),  # and biases
    # GPT-2 medium: 393,216 by the formula; the paper prints 0.35M
    (meta.gpt2_medium_meta, M.LoRA(rank=4), 393_216),
    # ViT-B/16
    (meta.vit_b16_meta, M.BitFit(), 102_912),
    (meta.vit_b16_meta, M.NormTuning(), 38_400),
    (meta.vit_b16_meta, M.Full(), 85_798_656),
    (meta.vit_b16_meta, M.SSF(), 205_824),  # arXiv 2210.08823, by its code: 12 * 16,896 + 3,072
    (meta.vit_b16_meta, M.Pfeiffer(bottleneck=8), 156_768),  # arXiv 2212.03145, table 1: 0.157M
    # the size of CLIP ViT-B/32's image tower, arXiv 2203.16329's README: less 29,523 for the head
    (meta.vit_b16_meta, M.KAdaptation(), 79_699 - 29_523),
    (meta.vit_b16_meta, M.LoRA(rank=4), 176_979 - 29_523),
    (meta.vit_b16_meta, M.BottleneckAdapter(bottleneck=64, layer_norm="in"), 1_237_587 - 29_523),
    (meta.vit_b16_meta, M.CompacterPlusPlus(bottleneck=64, layer_norm="in"), 77_907 - 29_523 + 4**3),  # and the A_i
]


@pytest.mark.parametrize(("backbone", "method", "numbers"), COUNTS)
def test_adapter(backbone: Backbone, method: Method, numbers: int):
    assert count(backbone, method).adapter == numbers


# arXiv 2106.04647, table 1, at k = 24: T5-base with its embeddings cut to the tokenizer's 32,100 words
T5_BASE = [
    (M.Houlsby(bottleneck=24), 1_855_104, "0.832"),  # Adapter
    (M.Houlsby(bottleneck=24, sites=("self.attn",)), 951_360, "0.427"),  # Pfeiffer-Adapter: behind self-attention
    (M.AdapterDrop(), 1_101_984, "0.494"),
    (M.LowRankAdapter(), 161_664, "0.073"),
    (M.PHMAdapter(), 398_976, "0.179"),
    (M.PHMAdapter(division=4), 534_144, "0.240"),
    (M.PHMAdapter(division=8), 355_968, "0.160"),
    (M.Compacter(), 161_728, "0.073"),
    (M.Compacter(division=8), 162_176, "0.073"),
    (M.Compacter(division=12), 163_392, "0.073"),
    (M.Compacter(bottleneck=96), 172_096, "0.077"),
    (M.CompacterPlusPlus(), 104_704, "0.047"),
    (M.CompacterPlusPlus(division=8), 105_152, "0.047"),
    (M.CompacterPlusPlus(division=12), 106_368, "0.048"),  # as in the paper's table of SuperGLUE
    (M.PromptTuning(length=100), 76_800, "0.034"),
]


@pytest.mark.parametrize(("method", "numbers", "percent"), T5_BASE)
def test_compacters_table(method: Method, numbers: int, percent: str):
    """Trained numbers with the 47,616 of the norms, and their percentage."""
    found = count(meta.t5_base_meta, method, vocab_size=32_100)
    assert found.backbone == 222_882_048
    assert found.norms == (0 if isinstance(method, M.PromptTuning) else 47_616)
    assert (found.trainable, f"{found.percent:.3f}") == (numbers, percent)


# arXiv 2205.00305, table 1: 0.06M and 0.17M, by L (d + f + 1) with what its ablation shares; the norms behind the
# feed-forward networks apart
@pytest.mark.parametrize(("share", "base", "large"), [
    ("none", 46_092, 122_904), ("alpha", 12_289, 28_673), ("v", 37_644, 99_352), ("both", 3_841, 5_121)])
def test_adapterbias(share: Any, base: int, large: int):
    for backbone, numbers, norms in ((meta.bert_base_meta, base, 18_432), (meta.roberta_base_meta, base, 18_432),
                                     (meta.bert_large_meta, large, 49_152)):
        found = count(backbone, M.AdapterBias(share=share))
        assert (found.adapter, found.norms) == (numbers, norms)


def test_the_norms_that_adapterbias_code_trains():
    for backbone, numbers in ((meta.bert_base_meta, 66_060), (meta.bert_large_meta, 174_104)):
        found = count(backbone, M.AdapterBias(norms="mlp+embed"))
        assert found.adapter + found.norms == numbers


# arXiv 2110.04366, figures 2 to 6, BART-large: 36 attentions, 24 feed-forward networks, d = 1,024. The paper leaves
# biases out: r + d for each adapter
BART_LARGE = [
    (M.PrefixTuning(length=200), 14_745_600, 0),
    (M.PrefixTuning(length=512), 37_748_736, 0),
    (M.PrefixTuning(length=30), 2_211_840, 0),
    (M.MultiHeadParallelAdapter(bottleneck=200), 14_745_600, 0),
    (M.MultiHeadParallelAdapter(bottleneck=30), 2_211_840, 0),
    (M.ParallelAdapter(bottleneck=200, sites=("attn",)), 14_745_600, 36 * (200 + 1024)),
    (M.ParallelAdapter(bottleneck=512, sites=("attn",)), 37_748_736, 36 * (512 + 1024)),
    (M.ParallelAdapter(bottleneck=30, sites=("attn",)), 2_211_840, 36 * (30 + 1024)),
    (M.BottleneckAdapter(bottleneck=200), 9_830_400, 24 * (200 + 1024)),
    (M.ParallelAdapter(bottleneck=512), 25_165_824, 24 * (512 + 1024)),
    (M.ScaledParallelAdapter(bottleneck=512), 25_165_824, 24 * (512 + 1024)),
    (M.Pfeiffer(bottleneck=600), 29_491_200, 24 * (600 + 1024)),
    (M.ParallelAdapter(bottleneck=1024), 50_331_648, 24 * (1024 + 1024)),
    (M.LoRA(rank=200), 29_491_200, 0),
    (M.LoRA(rank=400), 58_982_400, 0),
    (M.LoRA(rank=102, sites=FFN), 25_067_520, 0),
    (M.LoRA(rank=120, sites=FFN), 29_491_200, 0),
    (M.MAM(), 27_377_664, 24 * (512 + 1024)),
    (M.PrefixTuning(length=30, hidden=800), 61_608_288, 0),  # what trains; 62.1M at l = 200 in an issue of the code
    (M.PrefixTuning(length=200, hidden=800), 62_130_528, 0),
]


@pytest.mark.parametrize(("method", "numbers", "biases"), BART_LARGE)
def test_the_unified_views_table(method: Method, numbers: int, biases: int):
    assert count(meta.bart_large_meta, method).adapter == numbers + biases


@pytest.mark.parametrize(("backbone", "method", "biases", "percent"), [
    (meta.bart_large_meta, M.PrefixTuning(length=200), 0, "3.6"),
    (meta.bart_large_meta, M.MAM(), 24 * (512 + 1024), "6.7"),
    (meta.roberta_base_meta, M.MAM(length=16, bottleneck=16), 12 * (16 + 768), "0.5")])
def test_the_unified_views_percentages(backbone: Backbone, method: Method, biases: int, percent: str):
    found = count(backbone, method)
    assert f"{100 * (found.adapter - biases) / found.backbone:.1f}" == percent


# arXiv 2212.03145, table 1 and the ranks of its code, ViT-B/16: 2 d r + 12 L r^2; 2 d r + 12 L r + r^3
FACT = {"tt": {1: 1_680, 2: 3_648, 4: 8_448, 8: 21_504, 16: 61_440, 32: 196_608},
        "tk": {2: 3_368, 4: 6_784, 8: 13_952, 16: 30_976, 32: 86_528, 64: 369_664}}


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact(form: Any):
    for rank, numbers in FACT[form].items():
        assert count(meta.vit_b16_meta, M.FacT(form=form, rank=rank)).adapter == numbers


@pytest.mark.parametrize(("form", "sites", "rank", "numbers"), [
    # the ablation of section 4.5, attention or feed-forward network alone: 4 or 8 of the 12 slices of a block
    ("tt", ("attn.q", "attn.k", "attn.v", "attn.o"), 16, 2 * 768 * 16 + 4 * 12 * 16**2),
    ("tt", FFN, 16, 2 * 768 * 16 + 8 * 12 * 16**2),
    ("tk", ("attn.q", "attn.k", "attn.v", "attn.o"), 8, 2 * 768 * 8 + 4 * 12 * 8 + 8**3),
    ("tk", FFN, 8, 2 * 768 * 8 + 8 * 12 * 8 + 8**3)])
def test_fact_on_a_part_of_the_block(form: Any, sites: tuple[str, ...], rank: int, numbers: int):
    assert count(meta.vit_b16_meta, M.FacT(form=form, rank=rank, sites=sites)).adapter == numbers


@pytest.mark.parametrize(("form", "ranks", "mean"), [
    ("tt", ([8, 16, 8, 16, 8, 16, 8], [8, 8, 8, 8], [16, 4, 16, 16, 16, 16, 16, 8]), 36_649),
    ("tk", ([32, 32, 16, 32, 16, 32, 16], [32, 32, 32, 16], [32, 16, 32, 32, 32, 32, 32, 16]), 69_333)])
def test_facts_means_over_vtab(form: Any, ranks: tuple[list[int], ...], mean: int):
    """0.037M and 0.069M: the means over the three groups of tasks, at the ranks that the code has for each task."""
    numbers = {r: count(meta.vit_b16_meta, M.FacT(form=form, rank=r)).adapter for r in {r for g in ranks for r in g}}
    assert round(sum(sum(numbers[r] for r in group) / len(group) for group in ranks) / 3) == mean


def test_fact_on_swin():
    """0.135M, table 3: each stage has its own U and V."""
    found = count(meta.swin_base_meta, M.FacT(rank=16))
    assert (found.adapter, found.backbone) == (135_168, 86_743_224)


@pytest.mark.parametrize(("backbone", "numbers"), [
    (meta.bert_base_meta, 109_482_240), (meta.t5_base_meta, 222_903_552), (meta.vit_b16_meta, 85_798_656),
    (meta.bart_large_meta, 406_291_456), (meta.roberta_base_meta, 124_645_632 - 768 * 769)])  # without pooler
def test_backbone(backbone: Backbone, numbers: int):
    assert count(backbone, M.LoRA()).backbone == numbers


def test_norms_and_head_are_apart():
    found = count(meta.bert_base_meta, M.Houlsby(), num_labels=2)
    assert (found.norms, found.head) == (38_400, 768 * 2 + 2)
    assert found.trainable == 2_379_264 + 38_400 + 1_538
    assert count(meta.bert_large_meta, M.Houlsby()).norms == 100_352
    assert count(meta.t5_xl_meta, M.LoRA(rank=4, sites=ALL, norms="all")).trainable == 9_097_216
    assert count(meta.roberta_base_meta, M.LoRA(), num_labels=2).head == 592_130


def test_a_reparametrisation_is_not_stored():
    found = count(meta.bert_base_meta, M.PrefixTuning(length=30, hidden=512, head="none"))
    assert (found.trainable, found.stored) == (9_872_384, 552_960)
    assert count(meta.bart_large_meta, M.PrefixTuning(length=30, hidden=800)).stored == 2_211_840


@pytest.mark.parametrize("classes", [940, 1173])
def test_the_heads_of_vtab_and_fgvc(classes: int):
    found = count(meta.vit_b16_meta, M.LinearProbe(), num_labels=classes)
    assert (found.adapter, found.head) == (0, classes * 769)
    assert 940 * 769 + 1173 * 769 == 1_624_897
