"""What a PEFT folder may not be: every refusal says what and where, and leaves the model as it was."""
import json
import re

import pytest
import torch
from adapterhub_cases import refused as unchanged
from peft_cases import from_peft, in_peft, logits, peft
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import methods
from slimtune.errors import DeltaError, SlimtuneError
from slimtune.io.peft import load_peft, save_peft
from slimtune.testing import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    """A sound LoRA on BERT's query and value, with its head."""
    from_peft("bert", peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"), tmp_path)
    return tmp_path


def refused(folder, match, family="bert", **changes):
    unchanged(folder, match, model=tiny(family, **changes))


def config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def tensors(folder, change):
    values = load_file(folder / TENSORS)
    change(values)
    save_file(values, folder / TENSORS)


@pytest.mark.parametrize(("field", "value"), [
    ("use_dora", True), ("lora_bias", True), ("layer_replication", [[0, 2], [1, 2]]), ("use_qalora", True),
    ("trainable_token_indices", [1, 2]), ("target_parameters", ["experts.up"]), ("bias", "all"), ("bias", "lora_only"),
    ("alora_invocation_tokens", [3]), ("use_bdlora", {"nblocks": 2}), ("arrow_config", {"top_k": 2}),
    ("velora_config", {"num_groups": 2}), ("kasa_config", {"beta": 1.0}), ("monteclora_config", {"num_samples": 2}),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"), ("megatron_config", {"a": 1}), ("a_field_of_tomorrow", 1),
])
def test_fields_that_change_the_result(folder, field, value):
    config(folder, **{field: value})
    refused(folder, rf"{CONFIG}: {field} is ")


@pytest.mark.parametrize(("field", "value"), [
    ("use_dora", False), ("fan_in_fan_out", True), ("init_lora_weights", "gaussian"), ("runtime_config", {"a": 1}),
    ("eva_config", {"rho": 2.0}), ("a_field_of_tomorrow", None), ("revision", "main"), ("lora_alpha", 8.0)])
def test_fields_that_change_nothing(folder, field, value):
    want = in_peft("bert", folder)
    config(folder, **{field: value})
    model = tiny("bert")
    slimtune.load(model, folder)
    torch.testing.assert_close(logits(model, "bert"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("field", "value"), [
    ("r", "2"), ("r", 0), ("r", 2.5), ("lora_alpha", "x"), ("lora_alpha", None), ("lora_dropout", 1.5),
    ("use_rslora", "yes"), ("target_modules", 3), ("target_modules", {"a": 1}), ("rank_pattern", {"q": "x"}),
    ("modules_to_save", "classifier"),
    ("target_modules", "(query"), ("layers_to_transform", "all"), ("bias", "some"), ("lora_alpha", True)])
def test_values_of_the_wrong_kind(folder, field, value):
    config(folder, **{field: value})
    refused(folder, re.escape(f"{CONFIG}: {field}"))


@pytest.mark.parametrize(("value", "match"), [
    ("ADALORA", "ADALORA.*does not read"), ("LORRA", "Did you mean 'LORA'"), (None, "names no peft_type"),
    (3, "has peft_type 3"), (..., "names no peft_type"), ("lora", "'lora'"), ("PROMPT_TUNING", "num_virtual_tokens")])
def test_types(folder, value, match):
    config(folder, peft_type=value)
    refused(folder, match)


def put(key, *shape, fill=1.0, dtype=torch.float32):
    """A change that adds or replaces one tensor."""
    return lambda t: t.update({key: torch.full(shape, fill, dtype=dtype)})


A, B, KEY = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", QUERY.replace("query", "key")
HEAD = "base_model.model.classifier"


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t.pop(A), "bert.encoder.layer.0.attention.self.query has no A"),
    (lambda t: [t.pop(A), t.pop(B)], "target_modules names .*0.attention.self.query"),
    (lambda t: [t.pop(k) for k in list(t) if "lora" in k], "target_modules names"),
    (lambda t: t.clear(), "target_modules names"),
    (put(f"{QUERY}.lora_magnitude_vector", 32), "query.lora_magnitude_vector.*nothing"),
    (put(f"{QUERY}.lora_B.bias", 32), "query.lora_B.bias"),
    (put("base_model.model.bert.pooler.dense.weight", 32, 32), "bert.pooler.dense.weight"),
    (put("base_model.model.classifer.weight", 3, 32), "classifer is no module.*\n.*'classifier'"),
    (put("classifier.weight", 3, 32), "does not start with base_model"),
    (put(f"{HEAD}.gain", 3), "classifier.gain"),
    (lambda t: [put(f"{KEY}.lora_A.weight", 2, 32)(t), put(f"{KEY}.lora_B.weight", 32, 2)(t)],
     "self.key, which target_modules does not name"),
    (put(A.replace("layer.0", "layer.9"), 2, 32), "layer.9.* no module"),
    (put(A, 3, 32), r"A of .*query has shape \(3, 32\)"),
    (put(B, 2, 32), r"B of .*\(2, 32\), and should have \(32, 2\)"),
    (put(A, 2, 32, fill=float("nan")), "query.lora_A.weight' holds NaN"),
    (put(A, 2, 32, fill=float("inf")), "holds NaN or Inf"),
    (put(A, 2, 32, fill=1, dtype=torch.int32), "torch.int32"),
    (put(f"{HEAD}.weight", 4, 32), r"head.classifier.weight.*\(4, 32\)"),
])
def test_tensors_that_do_not_fit(folder, change, match):
    tensors(folder, change)
    refused(folder, match)


def test_another_model(folder):
    refused(folder, "should have", hidden_size=16)
    refused(folder, "no module", num_hidden_layers=1)
    refused(folder, "target_modules names", num_hidden_layers=3)
    refused(folder, "no module", family="roberta")


@pytest.mark.parametrize(("name", "data", "match"), [
    (CONFIG, b"{", "not valid JSON"), (CONFIG, b"[]", "not an object"),
    (CONFIG, b"\xff\xfe", "not valid JSON"),
    (CONFIG, b'{"peft_type": "LORA", "r": NaN}', "not valid JSON"), (CONFIG, b'{"r": 1, "r": 2}', "not valid JSON"),
    (CONFIG, b"", "not valid JSON"), (TENSORS, b"", "not a safetensors file"),
    (TENSORS, b"PK\x03\x04junkjunk", "pickle"),
    (TENSORS, b"\xff" * 64, "not a safetensors file"),
    (TENSORS, (10**9).to_bytes(8, "little") + b"{}", "header claims"),
])
def test_malformed_files(folder, name, data, match):
    (folder / name).write_bytes(data)
    refused(folder, match)


@pytest.mark.parametrize("cut", range(1, 16))
def test_truncated_tensors(folder, cut):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) * cut // 16])
    refused(folder, TENSORS)


def test_missing_files_and_a_pickle(folder):
    (folder / TENSORS).unlink()
    refused(folder, f"{TENSORS} could not be read")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, "a pickle.*\n.*safe_serialization=True")


def test_the_folder_above(folder):
    inner = folder / "sst2"
    inner.mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(inner / name)
    with pytest.raises(DeltaError, match="Name one of them"):
        load_peft(tiny("bert"), folder)


def test_a_prompt_that_peft_would_pool(tmp_path):
    from_peft("bert", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), tmp_path)
    refused(tmp_path, "first token")


@pytest.mark.parametrize(("changes", "match"), [
    ({"num_virtual_tokens": 3}, "should have"), ({"num_layers": 3}, "num_layers is 3; this gpt2 has 2"),
    ({"num_attention_heads": 2}, "num_attention_heads is 2"), ({"num_virtual_tokens": ...}, "num_virtual_tokens")])
def test_prefixes_that_do_not_fit(changes, match, tmp_path):
    from_peft("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), tmp_path)
    config(tmp_path, **changes)
    refused(tmp_path, match, family="gpt2")


def test_a_prefix_whose_head_does_not_fit_leaves_the_attention_as_it_was(tmp_path):
    save_file({"prompt_embeddings": torch.ones(2, 128), "base_model.classifier.weight": torch.ones(9, 32)},
              tmp_path / TENSORS)
    values = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "num_layers": 2, "num_attention_heads": 4}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    refused(tmp_path, r"head.classifier.weight has shape \(9, 32\)")


def test_a_prefix_without_its_matrix(tmp_path):
    from_peft("t5", peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4), tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / TENSORS)
    refused(tmp_path, "there is no tensor 'prompt_embeddings'", family="t5")


def test_ia3_feed_forward_input_that_is_no_site(tmp_path):
    settings = peft.IA3Config(target_modules=["key", "intermediate.dense"], feedforward_modules=["intermediate.dense"])
    from_peft("bert", settings, tmp_path)
    refused(tmp_path, "intermediate.dense is a feed-forward module")


@pytest.mark.parametrize(("family", "method", "match"), [
    ("bert", [methods.Houlsby()], "no counterpart of Houlsby"),
    ("bert", [methods.BitFit()], "no counterpart of BitFit"),
    ("bert", [methods.LoRA(), methods.IA3()], "one method, and this delta is a union: LoRA \\+ IA3"),
    ("bert", [methods.LoRA(sites=("mlp",))], "encoder.0.mlp has no counterpart in PEFT"),
    ("bert", [methods.IA3(sites=("attn.o", "attn.heads"))], "one vector of IA3 a module"),
    ("llama", [methods.LoRA(dropout=0.1), methods.LoRA(sites=("mlp.up",))], "one dropout"),
    ("gpt2", [methods.PrefixTuning(length=2)], "positions='apart'"),
    ("gpt2", [methods.PrefixTuning(length=2, blocks=(0,), positions="before")], "decoder.1.attn"),
    ("t5", [methods.PrefixTuning(length=2, positions="before")], "decoder.self.attn"),
    ("bert", [methods.PromptTuning(length=2)], "first token"),
    ("t5", [methods.PromptTuning(length=2, towers=("decoder",))], "prompt for decoder"),
    ("vit", [methods.PromptTuning(length=2)], "prompt for vision"),
])
def test_deltas_that_peft_cannot_hold(family, method, match, tmp_path):
    delta = slimtune.attach(tiny(family), method)
    with pytest.raises(SlimtuneError, match=match):
        save_peft(delta, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_not_replaced(folder):
    delta = slimtune.attach(tiny("bert"), methods.LoRA(rank=2))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(DeltaError, match="not replaced"):
        save_peft(delta, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    save_peft(delta, folder / "new")
    save_peft(delta, folder / "new")  # ours may be
    assert {p.name for p in (folder / "new").iterdir()} == {CONFIG, TENSORS, "slimtune.json"}


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    delta = slimtune.attach(tiny("bert"), methods.LoRA(rank=2))
    next(delta.parameters()).data.fill_(float("nan"))
    with pytest.raises(DeltaError, match="NaN"):
        save_peft(delta, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
