"""Hidden dimensions sliced out: the gated outputs, plain modules, files, counts, and what cannot be.

What a gated model is, is in tests/core/test_stream.py.
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.lowrank import low_rank
from slimtune.testing import batch, output, tiny
from slimtune.testing.case import outline

FAMILIES = ("bert", "roberta", "distilbert", "mpnet", "gpt2", "llama", "qwen2", "mistral", "vit", "deit", "beit",
            "dinov2", "dinov2_with_registers")
REFUSED = {"electra": "widths", "deberta-v2": "rel_embeddings", "t5": "2 towers", "bart": "2 towers",
           "swin": "different widths", "clip": "2 towers"}


def gated(family: str, seed: int = 1, lora: bool = True, **changes):
    """A tiny model with soft coefficients on all that can be gated, a third of them 0, and LoRA beside them."""
    model = tiny(family, **changes)
    sites = ("mlp.act",) if family == "mpnet" else ("attn.heads", "mlp.act")
    more = [st.methods.LoRA(rank=2, sites=("attn.v", "mlp.down"))] if lora else []
    delta = st.attach(model, [st.methods.Gates(sites=sites, hidden=True), *more])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in delta.named_parameters():
            if "gates" not in name:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
                continue
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
            p[torch.rand(p.shape, generator=g) < 0.3] = 0
            p[0] = 0.7
    return model, delta


@torch.no_grad()
def run(model: nn.Module, family: str) -> Tensor:
    return output(model, batch(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sliced_computes_what_was_gated(family: str):
    """Soft coefficients of heads, neurons and dimensions together; nothing but plain modules is left."""
    model, delta = gated(family)
    told, left = run(model, family), int((delta.tensors()["shared.gates.hidden"] != 0).sum())
    kinds = {type(m) for m in tiny(family).modules()}
    report = st.shrink(model)
    torch.testing.assert_close(run(model, family), told, rtol=1e-5, atol=1e-5)
    assert report.difference <= 1e-5
    assert list(report.hidden.values()) == [left] == [st.dissect(model).towers[0].width]
    assert f"hidden {st.dissect(model).towers[0].name}={left}" in str(report)
    assert {type(m) for m in model.modules()} <= kinds
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
    assert 32 not in {p.shape[-1] for n, p in model.named_parameters() if "norm" in n.lower() and p.dim() == 1}
    fresh = st.attach(model, st.methods.LoRA(rank=2, sites=("linear",)))
    assert torch.equal(run(model, family), run(model, family))
    assert fresh.count().adapter > 0


@settings(max_examples=12, deadline=None)
@given(some.sampled_from(["bert", "gpt2"]), some.sets(some.integers(0, 31), min_size=1), some.sets(some.integers(0, 3)),
       some.sets(some.integers(0, 63)))
def test_any_mask(family: str, hidden: set[int], heads: set[int], neurons: set[int]):
    """Whatever lives, even one dimension, or no head and no neuron of a block."""
    model = tiny(family)
    delta = st.attach(model, st.methods.Gates(hidden=True))
    tower = delta.anatomy.towers[0].name
    live = {"shared.gates.hidden": hidden, f"{tower}.0.attn.heads.gates.c": heads,
            f"{tower}.1.mlp.act.gates.c": neurons}
    delta.set_masks({n: torch.zeros_like(delta.tensors()[n], dtype=torch.bool).index_fill(
        0, torch.tensor(sorted(own), dtype=torch.long), True) for n, own in live.items()})
    told = run(model, family)
    report = st.shrink(model)
    torch.testing.assert_close(run(model, family), told, rtol=1e-5, atol=1e-5)
    assert report.hidden == ({} if len(hidden) == 32 else {tower: len(hidden)})
    assert model.get_input_embeddings().weight.shape == (99, len(hidden))


@pytest.mark.parametrize(("family", "each"), [
    ("bert", 99 + 64 + 2 + 2 + 2 * (4 * 32 + 2 * 64 + 2 + 4) + 32),
    ("vit", 48 + 1 + 1 + 17 + 2 * (4 * 32 + 128 + 6) + 5),
    ("gpt2", 99 + 64 + 2 * (4 * 32 + 128 + 2 + 4) + 2), ("llama", 2 * 99 + 2 * (2 * 64 + 2 * 16 + 3 * 64 + 2) + 1)])
def test_a_dimension_takes_its_own_numbers_with_it(family: str, each: int):
    """Of tables, maps, biases of what writes, norms and the head; on LLaMA, of 4 heads of 16, one of them of keys."""
    changes = {"head_dim": 16, "num_key_value_heads": 1} if family == "llama" else {}
    model = tiny(family, **changes)
    before = sum(p.numel() for p in model.parameters())
    st.shrink(model, keep={f"{st.dissect(model).towers[0].name}.hidden": range(4, 25)})
    assert sum(p.numel() for p in model.parameters()) == before - 11 * each


@pytest.mark.parametrize(("family", "tokens", "formula"), [
    ("bert", 10, lambda h: 2 * (10 * (4 * h * 32 + 2 * h * 64) + 2 * 100 * 32)),
    ("gpt2", 10, lambda h: 2 * (10 * (4 * h * 32 + 2 * h * 64) + 2 * 100 * 32)),
    ("llama", 7, lambda h: 2 * (7 * (2 * h * 32 + 2 * h * 16 + 3 * h * 64) + 2 * 49 * 32))])
def test_multiply_adds(family: str, tokens: int, formula):
    """Every map of a block loses its share; scores and sums of attention stay."""
    model = tiny(family)
    macs = st.count_macs(model, tokens, hidden_kept=20)
    assert macs.total == formula(20)
    assert st.count_macs(model, tokens).total == formula(32)
    both = st.count_macs(model, tokens, 1, 9, hidden_kept=20)
    tower = st.dissect(model).towers[0].name
    keep = {site: [0] for site in macs.heads} | {site: range(9) for site in macs.neurons}
    st.shrink(model, keep={f"{tower}.hidden": range(20)})
    assert st.count_macs(model, tokens) == macs
    st.shrink(model, keep=keep)
    assert st.count_macs(model, tokens).blocks == both.blocks
    low_rank(small := tiny(family), {"mlp.up": 3, "mlp.down": 3})
    asked = st.count_macs(small, tokens, hidden_kept=20)
    st.shrink(small, keep={f"{tower}.hidden": range(20)})
    assert st.count_macs(small, tokens).blocks == asked.blocks
    with pytest.raises(MethodError, match="hidden_kept is 33"):
        st.count_macs(tiny(family), hidden_kept=33)
    with pytest.raises(MethodError, match="2 towers"):
        st.count_macs(tiny("bart"), hidden_kept=3)


READ = """
import sys, torch, slimtune as st
from safetensors.torch import save_file
from slimtune.testing import batch, output
torch.set_num_threads(1)
for family in sys.argv[2:]:
    model = st.load_model(sys.argv[1] + "/" + family)
    with torch.no_grad():
        save_file({"out": output(model, batch(family)).contiguous()}, sys.argv[1] + "/" + family + ".out")
"""


def test_bitwise_in_another_process(tmp_path: Path):
    from safetensors.torch import load_file
    families = ("bert", "roberta", "gpt2", "llama", "vit", "dinov2")
    told, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for family in families:
        model, _ = gated(family)
        st.shrink(model)
        st.save_model(model, tmp_path / family)
        told[family] = run(model, family)
        if family == "gpt2":
            assert model.lm_head.weight is model.transformer.wte.weight
            again = st.load_model(tmp_path / family)
            assert again.lm_head.weight is again.transformer.wte.weight
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", READ, str(tmp_path), *families], check=True)
    for family, out in told.items():
        assert torch.equal(load_file(tmp_path / f"{family}.out")["out"], out), family


def test_a_second_shrink_and_what_an_earlier_one_left():
    """Attentions and networks that are gone leave biases of the stream's width."""
    for family in ("bert", "gpt2", "vit"):
        model = tiny(family)
        tower = st.dissect(model).towers[0].name
        st.shrink(model, keep={f"{tower}.0.attn.heads": [], f"{tower}.1.mlp.act": [], f"{tower}.hidden": range(30)})
        report = st.shrink(model, keep={f"{tower}.hidden": range(3, 20)})
        assert report.hidden == {tower: 17}
        assert report.difference <= 1e-5


def test_a_bare_backbone_is_narrower():
    from transformers import BertConfig, BertModel
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                 vocab_size=99)).eval()
    assert st.shrink(model, keep={"encoder.hidden": range(9)}).difference <= 1e-5
    with torch.no_grad():
        assert model(input_ids=torch.arange(5)[None]).last_hidden_state.shape == (1, 5, 9)


def test_a_failure_leaves_everything_as_it_was():
    """A head that is tied to the embeddings reads a space of its own."""
    from transformers import BertConfig, BertForMaskedLM
    model = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
                                       intermediate_size=64)).eval()
    before = outline(model)
    with pytest.raises(MethodError, match="tied to the embeddings"):
        st.shrink(model, keep={"encoder.hidden": range(9)})
    assert outline(model) == before
    for keep, message in (({"encoder.hidden": []}, "no hidden dimension"), ({"encoder.hidden": [32]}, "0 to 31"),
                          ({"decoder.hidden": [0]}, "Did you mean 'encoder.hidden'")):
        with pytest.raises(st.SlimtuneError, match=message):
            st.shrink(model, keep=keep)


SSF, GATES = st.methods.SSF(sites=("linear", "norm.*")), st.methods.Gates(hidden=True)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize(("methods", "at"), [([GATES, SSF], "SSF"), ([SSF, GATES], "SSF"), ([GATES, GATES], "Gates")])
def test_what_else_acts_at_the_norms_is_refused_before_anything_is_cut(family: str, methods: list, at: str):
    """In one delta, or in two that run together; with dimensions that went, or none."""
    model, told = tiny(family), batch(family)
    one = st.attach(model, methods)
    with pytest.raises(MethodError, match=rf"(?s)where {at} of delta 'default' acts as well \(.*norm.*shrink\(\)"):
        st.prune(one, 0.3, "random", on="hidden")
    before = outline(model)
    with pytest.raises(MethodError, match=f"where {at} of"):
        st.shrink(model, inputs=told)
    assert outline(model) == before
    one.detach()
    for name, method in zip("ab", methods, strict=True):
        st.attach(model, method, name=name)
    st.activate(model, "a", "b")
    with pytest.raises(MethodError, match=f"where {at} of delta '[ab]'"):
        st.shrink(model)
    if at == "SSF":
        st.deltas(model)["a" if methods[0] is GATES else "b"].detach()
        tower = st.dissect(model).towers[0].name
        with pytest.raises(MethodError, match="where SSF of"):
            st.shrink(model, keep={f"{tower}.hidden": range(9)})


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_ssf_beside_the_norms_or_folded_in_before_the_gates(family: str):
    for sites in (("linear",), ("embed", "linear", "norm.*")):
        model = tiny(family)
        methods = [st.methods.SSF(sites=sites), GATES]
        if "embed" in sites:
            st.attach(model, methods.pop(0))
            st.shrink(model)
        delta = st.attach(model, methods)
        st.prune(delta, 0.3, "random", on="hidden")
        told = run(model, family)
        assert st.shrink(model).difference <= 1e-5
        torch.testing.assert_close(run(model, family), told, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str):
    model = tiny(family)
    before = outline(model)
    with pytest.raises(MethodError, match=REFUSED[family]):
        st.attach(model, st.methods.Gates(hidden=True))
    assert outline(model) == before
    with pytest.raises(MethodError, match=REFUSED[family]):
        st.shrink(model, keep={f"{st.dissect(model).towers[0].name}.hidden": [0]})
    assert outline(model) == before


def test_electra_whose_embeddings_have_the_streams_width():
    model = tiny("electra", embedding_size=32)
    st.attach(model, st.methods.Gates(hidden=True))
    assert st.shrink(model, keep={"encoder.hidden": range(9)}).difference <= 1e-5
