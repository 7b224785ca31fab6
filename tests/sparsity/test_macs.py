"""count_macs against the published formula: T (4 H^2 + 2 H I) + 2 T^2 H a layer, and what is saved by less."""
import pytest
import torch

import slimtune as st
from slimtune.testing import tiny


@pytest.fixture(scope="module")
def base():
    from transformers import BertConfig, BertModel
    with torch.device("meta"):
        return BertModel(BertConfig())


def test_bert_base(base):
    macs = st.count_macs(base)
    assert macs.total == int(macs) == 11_173_625_856
    assert set(macs.blocks.values()) == {931_135_488}
    assert set(macs.heads.values()) == {27_262_976}
    assert set(macs.neurons.values()) == {196_608}
    assert macs.total == 12 * (12 * 27_262_976 + 3072 * 196_608)
    assert st.count_macs(base, 384).total == 12 * (384 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 384**2 * 768)
    assert round(st.count_macs(base, 384).total / 1e9, 2) == 35.33


@pytest.mark.parametrize(("tokens", "heads", "neurons", "saved"), [
    (128, 9, 2304, 25.0), (512, 9, 2304, 25.0), (128, 9, 3072, 8.8), (512, 9, 3072, 10.0), (128, 9, 1843, 34.7),
    (512, 9, 1843, 34.0)])
def test_dsee_table(base, tokens: int, heads: int, neurons: int, saved: float):
    """3 of 12 heads, and 0, 25 or 40 % of the neurons; exactly a quarter where a quarter of both goes."""
    share = st.count_macs(base, tokens, heads, neurons).total / st.count_macs(base, tokens).total
    assert round(100 * (1 - share), 1) == saved
    assert saved != 25.0 or share == 0.75


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "vit", "clip"])
def test_what_is_asked_for_is_what_slicing_gives(family: str):
    model = tiny(family)
    macs = st.count_macs(model, 10)
    heads, neurons = dict.fromkeys(macs.heads, 1), {site: 3 + i for i, site in enumerate(macs.neurons)}
    asked = st.count_macs(model, 10, heads, neurons)
    assert asked.total == st.count_macs(model, 10, 1, list(neurons.values())).total
    st.shrink(model, keep={site: range(n) for site, n in (heads | neurons).items()})
    assert st.count_macs(model, 10).blocks == asked.blocks


def test_cross_attention_reads_the_tokens_of_the_encoder():
    """Keys and values on the encoder's tokens, queries and output on the decoder's. H = 32, I = 64, 2 layers each."""
    model, e, d, h, i = tiny("bart"), 20, 6, 32, 64
    encoder = e * (4 * h * h + 2 * h * i) + 2 * e * e * h
    decoder = d * (4 * h * h + 2 * h * i) + 2 * d * d * h + 2 * h * h * (d + e) + 2 * d * e * h
    assert st.count_macs(model, {"encoder": e, "decoder": d}).total == 2 * (encoder + decoder)


@pytest.mark.parametrize(("asked", "message"), [
    ({"heads_kept": 5}, "heads_kept is 5 at encoder.0.attn.heads, which has 4"),
    ({"neurons_kept": [3]}, "has 1 numbers"), ({"neurons_kept": [3, 3, 3]}, "has 3 numbers"),
    ({"heads_kept": {"encoder.9.attn.heads": 1}}, "encoder.9.attn.heads"), ({"tokens": {"text": 3}}, "encoder tower")])
def test_refused(asked: dict, message: str):
    with pytest.raises(st.SlimtuneError, match=message):
        st.count_macs(tiny("bert"), **asked)


def test_stages_are_refused():
    with pytest.raises(st.SlimtuneError, match="swin are not counted"):
        st.count_macs(tiny("swin"))
