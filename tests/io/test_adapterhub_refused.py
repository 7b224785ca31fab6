"""What an AdapterHub folder may not be, and what it cannot hold: every refusal says what and where."""
import io
import json
import pickle

import pytest
import torch
from adapterhub_cases import CONFIG, base, change, copy, logits, refused, values
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import methods
from slimtune.errors import DeltaError, SlimtuneError
from slimtune.io.adapterhub import save_adapterhub
from slimtune.methods import get
from slimtune.testing import tiny

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
DOWN = "bert.encoder.layer.0.output.adapters.seq_bn.adapter_down.0.weight"


@pytest.fixture
def folder(tmp_path):
    return copy("bert", "seq_bn", tmp_path)


def tensors(folder, change):
    found = load_file(folder / TENSORS)
    change(found)
    save_file(found, folder / TENSORS)


@pytest.mark.parametrize(("fields", "match"), [
    ({"use_gating": True}, "use_gating is 'True'"), ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
    ({"non_linearity": "mish"}, "non_linearity is 'mish'"), ({"non_linearity": "leakyrelu"}, "non_linearity"),
    ({"original_ln_after": False}, "original_ln_after=False"),
    ({"original_ln_before": False, "original_ln_after": False}, "original_ln_before=False, original_ln_after=False"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln=post_add"),
    ({"residual_before_ln": False}, "residual_before_ln=False"),
    ({"is_parallel": True, "original_ln_after": False}, "original_ln_after=False.*is_parallel=True"),
    ({"ln_before": True, "ln_after": True}, "ln_after is 'True'"),
    ({"ln_after": True, "adapter_residual_before_ln": True}, "adapter_residual_before_ln is 'True'"),
    ({"phm_layer": True, "scaling": "channel"}, "scaling is 'channel'"),
    ({"phm_layer": True, "phm_dim": 3}, "phm_dim"), ({"reduction_factor": {"0": 4}}, "reduction_factor.*\n.*layer 1"),
    ({"reduction_factor": 0}, "reduction_factor"), ({"reduction_factor": "16"}, "reduction_factor"),
    ({"scaling": "leaned"}, "scaling"), ({"leave_out": [0, 1]}, "no layer"),
    ({"mh_adapter": "yes"}, "mh_adapter"), ({"mh_adapter": ...}, "mh_adapter: Field required"),
    ({"a_flag_of_tomorrow": 1}, "a_flag_of_tomorrow is '1'"), ({"architecture": "reft"}, "architecture is 'reft'"),
    ({"architecture": "prompt_tuning"}, "architecture is 'prompt_tuning'"),
    ({"architecture": ["lora"]}, "architecture"), ({"architecture": "union"}, "'configs' of a union"),
])
def test_flags_that_change_the_result(folder, fields, match):
    change(folder, **fields)
    refused(folder, match)


@pytest.mark.parametrize(("fields", "match"), [
    ({"use_dora": True}, "use_dora"), ({"vera_d": 0.1}, "vera_d"), ({"vera_b": 0.0}, "vera_b"),
    ({"use_gating": True}, "use_gating"), ({"composition_mode": "scale"}, "r is '2'"), ({"r": 0}, "r: "),
    ({"selfattn_lora": False}, "no module"), ({"attn_matrices": ["o"]}, "no module"),
    ({"attn_matrices": ["q"]}, "value.loras.lora.lora_A belongs to nothing"), ({"output_lora": True}, "no tensor for"),
    ({"architecture": "mtl_lora"}, "mtl_lora"),
])
def test_flags_of_lora(tmp_path, fields, match):
    folder = copy("bert", "lora", tmp_path)
    change(folder, **fields)
    refused(folder, match)


@pytest.mark.parametrize(("fields", "match"), [
    ({"alpha": 2}, "alpha is '2"), ({"dropout": 0.1}, "dropout is '0.1'"), ({"r": 2}, "r is '2'")])
def test_flags_of_ia3(tmp_path, fields, match):
    folder = copy("bert", "ia3", tmp_path)
    change(folder, **fields)
    refused(folder, match)


@pytest.mark.parametrize(("fields", "match"), [
    ({"use_gating": True}, "use_gating"), ({"prefix_length": 4}, r"shape \(3, 8\)"), ({"flat": True}, "no tensor for"),
    ({"non_linearity": "sigmoid"}, "non_linearity"), ({"leave_out": [1]}, "should have")])
def test_flags_of_prefixes(tmp_path, fields, match):
    folder = copy("bert", "prefix", tmp_path)
    change(folder, **fields)
    refused(folder, match)


def test_a_prefix_on_t5_whose_relative_biases_the_library_moves(tmp_path):
    refused(copy("t5", "prefix", tmp_path), "first positions of the keys", "t5")


def test_a_compacter_that_the_library_saved_without_its_rule(tmp_path):
    folder = copy("t5", "compacterpp", tmp_path)
    change(folder, shared_phm_rule=True)
    refused(folder, "leaves it out when it saves", "t5")


@pytest.mark.parametrize("fields", [
    {"init_weights": "mam_adapter"}, {"stochastic_depth": 0.1}, {"learn_phm": False}, {"phm_dim": 3},
    {"a_flag_of_tomorrow": None}, {"adapter_residual_before_ln": True}, {"cross_adapter": True}])
def test_flags_that_change_nothing(folder, fields):
    change(folder, **fields)
    model = base("bert")
    slimtune.load(model, folder)
    torch.testing.assert_close(logits(model, "bert"), values("bert")["logits.seq_bn"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("edit", "match"), [
    (lambda t: t.pop(DOWN), "no tensor for encoder.layer.0.output.adapters.adapter_down.0.weight"),
    (lambda t: t.update({DOWN: torch.ones(3, 8)}), r"has shape \(3, 8\), and should have \(2, 8\)"),
    (lambda t: t.update({DOWN: torch.full((2, 8), float("nan"))}), "holds NaN"),
    (lambda t: t.update({DOWN: torch.ones(2, 8, dtype=torch.int32)}), "torch.int32"),
    (lambda t: t.update({DOWN.replace("layer.0", "layer.7"): torch.ones(2, 8)}), "layer.7.* belongs to nothing"),
    (lambda t: t.update({DOWN.replace("seq_bn", "other"): torch.ones(2, 8)}), "of an adapter 'other'"),
    (lambda t: t.update({"bert.invertible_adapters.seq_bn.F.0.weight": torch.ones(2)}), "invertible_adapters"),
    (lambda t: t.update({"bert.pooler.dense.weight": torch.ones(8, 8)}), "belongs to nothing that slimtune reads"),
])
def test_tensors_that_do_not_fit(folder, edit, match):
    tensors(folder, edit)
    refused(folder, match)


def test_copies_that_differ(tmp_path):
    folder = copy("bert", "prefix", tmp_path)
    found = torch.load(folder / PICKLE, weights_only=True)
    name = next(k for k in found if ".pool." in k)
    found[name] = found[name] + 1
    torch.save(found, folder / PICKLE)
    refused(folder, "are one tensor, and differ")


@pytest.mark.parametrize(("family", "match"), [("roberta", "made for bert, and this model is roberta"),
                                               ("gpt2", "made for bert, and this model is gpt2")])
def test_another_family(folder, family, match):
    refused(folder, match, family)


def test_a_family_that_is_not_known_and_another_size(folder):
    refused(folder, "names for llama are not known", model=tiny("llama"))
    refused(folder, "should have", model=tiny("bert"))


class Evil:
    """Opened by pickle, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("make", [
    lambda path: torch_bytes({"a": Evil(path)}), lambda path: pickle.dumps({"a": Evil(path)}),
    lambda path: torch_bytes([torch.ones(1)]), lambda path: torch_bytes({"a": 1}),
    lambda path: torch_bytes({1: torch.ones(1)}), lambda path: torch_bytes({DOWN: torch.ones(2, 8).to_sparse()}),
    lambda path: torch_bytes({DOWN: torch.ones(2, 8, device="meta")}), lambda path: b"",
    lambda path: b"PK\x03\x04junk", lambda path: torch_bytes({DOWN: torch.ones(2, 8)})[:-40]])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_read_as_tensors_or_not_at_all(folder, tmp_path, make):
    (folder / TENSORS).unlink()
    (folder / PICKLE).write_bytes(make(str(tmp_path / "ran")))
    refused(folder, PICKLE)
    assert not (tmp_path / "ran").exists()


def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(("name", "data", "match"), [
    (CONFIG, b"{", "not valid JSON"), (CONFIG, b'{"name": "a", "config": {}}', "mh_adapter"),
    (CONFIG, b'{"name": "a", "config": "pfeiffer"}', "'config' is no object"),
    (CONFIG, b'{"config": {}}', "'name' is no text"),
    (TENSORS, b"", "not a safetensors file"), (TENSORS, b"\x80\x04.", "safetensors file")])
def test_malformed_files(folder, name, data, match):
    (folder / name).write_bytes(data)
    refused(folder, match)


def test_missing_tensors(folder):
    (folder / TENSORS).unlink()
    refused(folder, "adapter.safetensors could not be read")


HEAD, HEAD_CONFIG = "model_head.safetensors", "head_config.json"


@pytest.mark.parametrize(("top", "edit", "match"), [
    ({"model_class": "BertForTokenClassification"}, None, "the head is of BertForTokenClassification"),
    ({}, lambda t: t.pop("classifier.bias"), "no tensor for classifier.bias"),
    ({}, lambda t: t.update({"classifier.weight": torch.ones(4, 8)}), r"\(4, 8\)"),
    ({}, lambda t: t.update({"scorer.weight": torch.ones(4, 8)}), "scorer.weight is no tensor"),
])
def test_heads_that_do_not_fit(tmp_path, top, edit, match):
    folder = copy("bert", "double_seq_bn", tmp_path)
    whole = json.loads((folder / HEAD_CONFIG).read_text()) | top
    (folder / HEAD_CONFIG).write_text(json.dumps(whole))
    if edit is not None:
        found = load_file(folder / HEAD)
        edit(found)
        save_file(found, folder / HEAD)
    refused(folder, match)


def test_a_language_models_head_that_was_trained(tmp_path):
    folder = copy("gpt2", "lora", tmp_path)
    found = load_file(folder / HEAD)
    found["lm_head.weight"] += 1
    save_file(found, folder / HEAD)
    refused(folder, "lm_head.weight is of the backbone, and differs", "gpt2")


@pytest.mark.parametrize(("family", "fields", "match"), [
    ("bert", {"layers": 3}, "layers=3"), ("bert", {"activation_function": "relu"}, "activation_function='relu'"),
    ("roberta", {"use_pooler": True}, "use_pooler=True"), ("vit", {"head_type": "multiple_choice"}, "multiple_choice"),
    ("bert", {"head_type": "masked_lm"}, "masked_lm")])
def test_heads_of_the_library_without_a_counterpart(tmp_path, family, fields, match):
    folder = copy(family, "head", tmp_path)
    change(folder, name=HEAD_CONFIG, **fields)
    refused(folder, match, family)


PLAIN = {"norms": "none"}


@pytest.mark.parametrize(("family", "union", "match"), [
    ("bert", [methods.Houlsby()], "trained tensor .*\n.*norms='none'"), ("bert", [methods.BitFit()], "no place for"),
    ("bert", [methods.PromptTuning(length=2)], "no counterpart of PromptTuning"),
    ("bert", [methods.IA3()], "no IA3 at encoder.0.mlp.act"),
    ("bert", [methods.LoRA(sites=("attn.o",))], "at encoder.0.attn.o"),
    ("bert", [methods.BottleneckAdapter(sites=("block",))], "at encoder.0.block"),
    ("gpt2", [methods.ParallelAdapter()], "behind its norm"),
    ("gpt2", [methods.Pfeiffer(sites=("norm.mlp",))], "norm.mlp"),
    ("t5", [methods.LoRA(sites=("self.attn.q",))], "leaves out: decoder.0.cross.attn.q"),
    ("bart", [methods.PrefixTuning(length=2, sites=("decoder.cross.attn",))], "leaves out: decoder.0.attn"),
    ("gpt2", [methods.PrefixTuning(length=2, positions="before")], "positions='before'"),
    ("bert", [methods.LoRA(), methods.LoRA(sites=("attn.k",))], "two configs of lora"),
    ("bert", [methods.LoRA(blocks=(0,)), methods.IA3(sites=("attn.k",), blocks=(1,))], "two configs of lora"),
    ("bert", [methods.Houlsby(**PLAIN), methods.ParallelAdapter()], "two configs of bottlenecks"),
    ("bert", [methods.Compacter(bottleneck=4 + 4 * i, blocks=(i,), **PLAIN) for i in (0, 1)], "two configs"),
    ("vit", [methods.Houlsby(**PLAIN), methods.LoRA(sites=("mlp.down",))], "runs behind an adapter"),
    ("llama", [methods.LoRA()], "names for llama"),
])
def test_deltas_that_adapterhub_cannot_hold(family, union, match, tmp_path):
    delta = slimtune.attach(tiny(family), union)
    with pytest.raises(SlimtuneError, match=match):
        save_adapterhub(delta, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_not_replaced(folder):
    delta = slimtune.attach(base("bert"), get("pfeiffer")(bottleneck=2))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(DeltaError, match="not replaced"):
        save_adapterhub(delta, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    save_adapterhub(delta, folder / "new")
    save_adapterhub(delta, folder / "new")
    assert {p.name for p in (folder / "new").iterdir()} == {CONFIG, TENSORS, HEAD_CONFIG, HEAD, "slimtune.json"}


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    delta = slimtune.attach(base("bert"), methods.LoRA(rank=2))
    next(delta.parameters()).data.fill_(float("nan"))
    with pytest.raises(DeltaError, match="NaN"):
        save_adapterhub(delta, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
