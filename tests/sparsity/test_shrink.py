"""shrink: what is sliced computes what the gates computed, has exactly as many numbers fewer, and still trains."""
import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.fingerprint import bits_digest
from slimtune.testing import batch, output, tiny
from slimtune.testing.case import outline
from slimtune.testing.tiny import NAMES

NO_HEADS = ("t5", "mpnet")
"""Families whose blocks share a bias for each head."""


def gated(family: str, empty: bool = False, lora: bool = True, **changes):
    """A tiny model, and a delta with gates: soft ones, zeros, a trained head, LoRA below; a first block of zeros."""
    model = tiny(family, **changes)
    sites = ("mlp.act",) if family in NO_HEADS else ("attn.heads", "mlp.act")
    more = [st.methods.LoRA(rank=2, sites=("attn.v", "mlp.down"))] if lora else []
    delta = st.attach(model, [st.methods.Gates(sites=sites), *more])
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in delta.named_parameters():
            if not name.endswith("gates.c"):
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
                continue
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
            p[torch.rand(p.shape, generator=g) < 0.4] = 0
            p[0] = 0.7
            if empty and ".0." in name:
                p.zero_()
    return model, delta


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def run(model: nn.Module, family: str) -> torch.Tensor:
    return output(model, batch(family))


@pytest.mark.parametrize("empty", [False, True], ids=["some", "first block empty"])
@pytest.mark.parametrize("family", NAMES)
def test_sliced_equals_gated(family: str, empty: bool):
    model, delta = gated(family, empty)
    told, zeros = run(model, family), {n: p.detach() == 0 for n, p in delta.named_parameters() if n.endswith("gates.c")}
    report = st.shrink(model)
    torch.testing.assert_close(run(model, family), told, rtol=1e-5, atol=1e-5)
    kept = report.heads | report.neurons
    assert kept == {n.removesuffix(".gates.c"): int((~z).sum()) for n, z in zeros.items()} | {
        site: n for site, n in kept.items() if f"{site}.gates.c" not in zeros}
    assert st.deltas(model) == {}
    assert report.parameters[1] == size(model) < report.parameters[0]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("family", "head", "neuron"), [
    ("bert", 4 * 8 * 32 + 3 * 8, 2 * 32 + 1), ("gpt2", 4 * 8 * 32 + 3 * 8, 2 * 32 + 1), ("vit", 4 * 8 * 32 + 3 * 8, 65),
    ("llama", (16 + 8 + 8 + 16) * 32, 3 * 32)])
def test_every_head_and_neuron_takes_its_own_numbers_with_it(family: str, head: int, neuron: int):
    model = tiny(family)
    tower = st.dissect(model).towers[0].name
    before = size(model)
    st.shrink(model, keep={f"{tower}.0.attn.heads": [1], f"{tower}.1.mlp.act": range(5, 20)})
    heads = next(s.heads for s in st.dissect(tiny(family)).sites if s.role == "attn.heads")
    assert size(model) == before - (heads - 1) * head - (64 - 15) * neuron


@torch.no_grad()
def test_the_rows_and_columns_are_those_of_what_is_kept():
    old, model = tiny("gpt2"), tiny("gpt2")
    st.shrink(model, keep={"decoder.0.attn.heads": [3, 1], "decoder.1.mlp.act": [7, 2]})
    attention, was = model.transformer.h[0].attn, old.transformer.h[0].attn
    rows = [*range(8, 16), *range(24, 32)]
    three = [part * 32 + r for part in range(3) for r in rows]
    assert torch.equal(attention.c_attn.weight, was.c_attn.weight[:, three])
    assert torch.equal(attention.c_attn.bias, was.c_attn.bias[three])
    assert torch.equal(attention.c_proj.weight, was.c_proj.weight[rows])
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (2, 16, 48)
    mlp, was = model.transformer.h[1].mlp, old.transformer.h[1].mlp
    assert torch.equal(mlp.c_fc.weight, was.c_fc.weight[:, [2, 7]])
    assert torch.equal(mlp.c_proj.weight, was.c_proj.weight[[2, 7]])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "swin"])
def test_lora_trains_on_what_is_left(family: str):
    model, _ = gated(family, empty=True)
    st.shrink(model)
    delta = st.attach(model, st.methods.LoRA(rank=2, sites=("linear",) if family != "gpt2" else ("attn.q", "mlp.up")))
    told = run(model, family)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(**batch(family)).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in delta.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert not torch.equal(run(model, family), told)
    delta.detach()
    assert torch.equal(run(model, family), told)


def test_whisper_and_mbart():
    """Families without a tiny model of the package; Whisper's keys have no bias and its views name the heads."""
    from transformers import MBartConfig, MBartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration
    small = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 1,
             "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
    sound = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    for model in (WhisperForConditionalGeneration(WhisperConfig(**small, **sound)),
                  MBartForConditionalGeneration(MBartConfig(**small, max_position_embeddings=64))):
        delta = st.attach(model.eval(), st.methods.Gates())
        with torch.no_grad():
            for c in delta.parameters():
                c[::2] = 0
                c[1] = 0.5
        report = st.shrink(model)
        assert report.difference < 1e-5
        assert set(report.heads.values()) == {2}
        assert len(report.heads) == 6


@pytest.mark.parametrize(("family", "changes"), [("t5", {}), ("mpnet", {}), ("beit", {
    "use_shared_relative_position_bias": True, "use_relative_position_bias": False})])
def test_the_same_heads_everywhere_where_a_bias_is_shared(family: str, changes: dict):
    model, inputs = tiny(family, **changes), batch(family)
    heads = list(st.count_macs(model).heads)
    with torch.no_grad():
        st.shrink(tiny(family, **changes))
        report = st.shrink(model, keep={key: [0, 2] for key in heads}, inputs=inputs)
    assert report.difference < 1e-5
    assert set(report.heads.values()) == {2}
    tables = [p for n, p in model.named_parameters() if "bias_table" in n or "relative_attention_bias" in n]
    assert tables
    assert all(t.shape[1] == 2 for t in tables)
    with pytest.raises(st.SlimtuneError, match="block by block"):
        st.shrink(model, keep={heads[0]: [1]})


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_a_cache_counts_tokens_where_the_first_attention_is_gone(family: str):
    model, ids = tiny(family), batch(family)["input_ids"][:2]
    st.shrink(model, keep={site: [] for site in st.count_macs(model).heads if ".0." in site})
    say = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **say), model.generate(ids, use_cache=False, **say))


@torch.no_grad()
def test_empty_blocks_leave_and_their_biases_stay():
    """A block of a pre-norm tower with no head and no neuron is x + b_o + b_down, which the block before adds."""
    for family, blocks in (("llama", 3), ("vit", 3), ("gpt2", 3)):
        changes = {"n_layer": blocks} if family == "gpt2" else {"num_hidden_layers": blocks}
        model = tiny(family, **changes)
        tower = st.dissect(model).towers[0].name
        keep = {site: [] for site in (*st.count_macs(model).heads, *st.count_macs(model).neurons) if ".1." in site}
        report = st.shrink(model, keep=keep)
        assert report.blocks == {tower: 2}
        assert report.difference < 1e-5
        assert model.config.num_hidden_layers == 2
        assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == ([] if family == "vit" else [0, 1])


@torch.no_grad()
@pytest.mark.parametrize(("family", "path", "key"), [
    ("bert", "bert.encoder.layer", "num_hidden_layers"), ("distilbert", "distilbert.transformer.layer", "n_layers"),
    ("qwen2", "model.layers", "num_hidden_layers"), ("gpt2", "transformer.h", "n_layer")])
def test_layers_are_dropped(family: str, path: str, key: str):
    model, old = tiny(family, **{key: 3}), tiny(family, **{key: 3})
    st.shrink(model, layers=[-2])
    assert getattr(model.config, key) == 2
    assert len(getattr(model.config, "layer_types", None) or [0, 0]) == 2
    blocks = old.get_submodule(path)
    del blocks[1]
    if family != "gpt2":  # GPT-2's cache asks each block for its place
        assert torch.equal(run(model, family), output(old, batch(family)))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in old.named_parameters()]


def test_a_mask_of_zeros_is_as_good_as_a_gate():
    """A head is gone when nothing reads it; a second shrink finds nothing more."""
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 8:24] = 0
        model.bert.encoder.layer[1].output.dense.weight[:, ::2] = 0
    report = st.shrink(model)
    assert report.heads == {"encoder.0.attn.heads": 2, "encoder.1.attn.heads": 4}
    assert report.neurons == {"encoder.0.mlp.act": 64, "encoder.1.mlp.act": 32}
    assert st.shrink(model).parameters == (size(model), size(model))


def test_full_fine_tuning_and_ties_stay():
    model = tiny("gpt2")
    delta = st.attach(model, [st.methods.Full(), st.methods.Gates()])
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.01)
        delta.tensors()["decoder.0.attn.heads.gates.c"][2] = 0
    told = run(model, "gpt2")
    st.shrink(model)
    torch.testing.assert_close(run(model, "gpt2"), told)
    assert model.lm_head.weight is model.transformer.wte.weight


@torch.no_grad()
def test_subnormals_are_flushed():
    model = tiny("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight[0, 0], weight[0, 1] = 1e-39, 1.2e-38
    st.shrink(model)
    now = model.bert.encoder.layer[0].output.dense.weight
    assert now[0, 0] == 0
    assert now[0, 1] != 0
    assert weight[0, 0] != 0


@pytest.mark.parametrize(("change", "message"), [
    ("heads", "cannot be cut block by block"), ("layers", "differs from the gated one"), ("forward", "does not run")])
def test_a_failure_leaves_everything_as_it_was(change: str, message: str, monkeypatch: pytest.MonkeyPatch):
    family = "bert" if change == "forward" else "t5"
    model, delta = gated(family)
    if change == "heads":
        delta.detach()
        delta = st.attach(model, st.methods.Gates())
        with torch.no_grad():
            delta.tensors()["encoder.0.attn.heads.gates.c"][1] = 0
    if change == "forward":  # a family whose modules state a width of their own
        dense = type(model.bert.encoder.layer[0].attention.self)
        plain = dense.forward
        monkeypatch.setattr(dense, "forward", lambda self, x, *a, **k: plain(self, x * self.query.bias[31], *a, **k))
    told, before, bits = run(model, family), outline(model), bits_digest(model)
    with pytest.raises(st.SlimtuneError, match=message):
        st.shrink(model, layers=[0] if change == "layers" else ())
    assert outline(model) == before
    assert bits_digest(model) == bits
    assert torch.equal(run(model, family), told)
    assert delta.active


def test_refused():
    model = tiny("bert")
    a = st.attach(model, st.methods.Gates(), name="a")
    b = st.attach(model, st.methods.Gates(), name="b")
    with pytest.raises(st.SlimtuneError, match="do not run, and would not fit a smaller model: a"):
        st.shrink(model)
    b.merge()
    with pytest.raises(st.SlimtuneError, match=r"'b' is merged"):
        st.shrink(model)
    b.detach()
    a.detach()
    for keep, message in (({"encoder.0.attn.head": [0]}, "Did you mean 'encoder.0.attn.heads'"),
                          ({"encoder.0.attn.heads": [4]}, "its units are 0 to 3"),
                          ({"encoder.0.mlp.act": torch.ones(3, dtype=torch.bool)}, "it has 64 units")):
        with pytest.raises(st.SlimtuneError, match=message):
            st.shrink(model, keep=keep)
    for layers, message in (([2], "block 2 of the encoder, which has 2"), ({"decoder": [0]}, "tower 'decoder'"),
                            ([0, 1], "no block in the encoder")):
        with pytest.raises(st.SlimtuneError, match=message):
            st.shrink(model, layers=layers)
    st.attach(model, st.methods.Pfeiffer(bottleneck=4))
    with pytest.raises(st.SlimtuneError, match="Pfeiffer"):
        st.shrink(model)
