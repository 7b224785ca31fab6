import json
import warnings

import pytest
import torch
from peft_cases import FAMILIES, IA3, LORA, from_peft, in_peft, inputs, logits, peft, shake, task
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import methods
from slimtune.core.fingerprint import bits_digest
from slimtune.io.peft import save_peft
from slimtune.testing import tiny

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SITES = {"lora": dict.fromkeys(FAMILIES, ("attn.q", "attn.v", "mlp.up")) |
                 {"t5": ("attn.q", "cross.attn.v", "mlp.down")},
         "ia3": dict.fromkeys(FAMILIES, ("attn.k", "attn.v", "mlp.act"))}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def loaded(family, folder, want, **changes):
    """slimtune's logits with a folder are `want`, the base's are not, and detaching restores the base bitwise."""
    model = tiny(family, **changes)
    before = bits_digest(model)
    delta = slimtune.load(model, folder)
    close(logits(model, family), want)
    with delta.disabled():
        assert not torch.allclose(logits(model, family), want, atol=1e-4)
    return model, delta, before


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_peft(family, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=LORA[family], task_type=task(family),
                             use_rslora=family == "llama", modules_to_save=["classifier"] if family == "vit" else None)
    want = from_peft(family, config, tmp_path)
    model, delta, before = loaded(family, tmp_path, want)
    assert (delta.count().head > 0) == (task(family) in (None, "SEQ_CLS"))
    delta.detach()
    assert bits_digest(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_of_peft(family, tmp_path):
    targets, forward = IA3[family]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=forward, task_type=task(family))
    loaded(family, tmp_path, from_peft(family, config, tmp_path))


@pytest.mark.parametrize(("family", "targets"), [("bert", ["LayerNorm"]), ("llama", ["input_layernorm", "norm"])])
def test_norm_tuning_both_ways(family, targets, tmp_path):
    config = peft.LNTuningConfig(target_modules=targets, task_type=task(family))
    want = from_peft(family, config, tmp_path / "theirs")
    _, delta, _ = loaded(family, tmp_path / "theirs", want)
    save_peft(delta, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "LN_TUNING"
    close(in_peft(family, tmp_path / "ours"), want)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_prefix_and_prompt_both_ways(family, config, layers, tmp_path):
    """Three layers as well: PEFT deals an encoder-decoder's prefixes differently when their number is odd."""
    changes = {"t5": {"num_layers": layers}, "bart": {"encoder_layers": layers, "decoder_layers": layers},
               "gpt2": {"n_layer": layers}, "llama": {"num_hidden_layers": layers}}[family]
    want = from_peft(family, config(task_type=task(family), num_virtual_tokens=4), tmp_path / "theirs", **changes)
    _, delta, _ = loaded(family, tmp_path / "theirs", want, **changes)
    save_peft(delta, tmp_path / "ours")
    close(in_peft(family, tmp_path / "ours", **changes), want)
    # a delta of our own, in which every layer has its own prefix
    model = tiny(family, **changes)
    sites = ("decoder.self.attn",)
    method = (methods.PrefixTuning(length=4, sites=sites, positions="before") if config is peft.PrefixTuningConfig
              else methods.PromptTuning(length=4))
    delta = slimtune.attach(model, method)
    shake(delta.parameters())
    save_peft(delta, tmp_path / "own")
    close(in_peft(family, tmp_path / "own", **changes), logits(model, family))
    again = slimtune.load(tiny(family, **changes), tmp_path / "own")
    assert all(torch.equal(value, delta.state()[name]) for name, value in again.state().items())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_prefix_of_bert_is_a_cache_in_front(family, tmp_path):
    """peft 0.21 no longer runs it (transformers renamed past_key_values), so transformers' own cache is the oracle."""
    from transformers import DynamicCache

    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 2 * 2 * 32, generator=g)
    save_file({"prompt_embeddings": matrix}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 5, "num_layers": 2,
              "num_attention_heads": 4, "token_dim": 32, "num_transformer_submodules": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model, given = tiny(family), inputs(family)
    pairs = matrix.view(1, 5, 4, 4, 8).expand(3, -1, -1, -1, -1).permute(2, 0, 3, 1, 4)
    cache = DynamicCache([(pairs[0], pairs[1]), (pairs[2], pairs[3])])
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), given["attention_mask"]], 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = getattr(model, model.base_model_prefix)(given["input_ids"], attention_mask=mask, past_key_values=cache)
        want = model.classifier(out[0] if family == "roberta" else out[1])
    loaded(family, tmp_path, want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_ours_in_peft_and_back(name, family, tmp_path):
    config = {"rank": 3, "alpha": 5.0, "dropout": 0.1} if name == "lora" else {}
    model = tiny(family)
    delta = slimtune.attach(model, methods.get(name)(sites=SITES[name][family], **config))
    shake(delta.parameters())
    save_peft(delta, tmp_path)
    want = logits(model, family)
    close(in_peft(family, tmp_path), want)
    again = slimtune.load(tiny(family), tmp_path)
    close(logits(again.model, family), want)
    if family != "gpt2":  # its slices come back as three
        assert again.state().keys() == delta.state().keys()
        assert all(torch.equal(value, delta.state()[key]) for key, value in again.state().items())


def test_slices_of_a_fused_projection_become_one_adapter_of_twice_the_rank(tmp_path):
    model = tiny("gpt2")
    delta = slimtune.attach(model, methods.LoRA(rank=3, alpha=5.0, rslora=True, sites=("attn.q", "attn.v")))
    shake(delta.parameters())
    save_peft(delta, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{n}.weight"] for n in "AB")
    assert (a.shape, b.shape) == ((6, 32), (96, 6))
    state = delta.state()
    assert torch.equal(b[:32, :3], state["decoder.0.attn.q.lora.B"])
    assert torch.equal(b[64:, 3:], state["decoder.0.attn.v.lora.B"])
    assert not b[32:64].any()
    assert not b[:32, 3:].any()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_attn"]
    close(in_peft("gpt2", tmp_path), logits(model, "gpt2"))


def test_an_adapter_of_a_fused_projection_goes_in_and_out_bitwise(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    from_peft("gpt2", config, tmp_path / "theirs")
    delta = slimtune.load(tiny("gpt2"), tmp_path / "theirs")
    assert delta.methods[0].sites == ("attn.q", "attn.k", "attn.v")
    save_peft(delta, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_ranks_and_scales_by_pattern_both_ways(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM",
                             rank_pattern={"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
                             alpha_pattern={"v_proj": 7})
    want = from_peft("llama", config, tmp_path / "theirs")
    _, delta, _ = loaded("llama", tmp_path / "theirs", want)
    assert sorted((m.rank, m.alpha) for m in delta.methods) == [(2, 5.0), (3, 5.0), (3, 7.0), (4, 5.0)]
    save_peft(delta, tmp_path / "ours")
    close(in_peft("llama", tmp_path / "ours"), want)


def test_two_loras_on_one_site_become_one(tmp_path):
    model = tiny("llama")
    delta = slimtune.attach(model, [methods.LoRA(rank=2, alpha=4.0, sites=("attn.q",)),
                                    methods.LoRA(rank=3, alpha=9.0, sites=("attn.q", "mlp.down"))])
    shake(delta.parameters())
    save_peft(delta, tmp_path)
    close(in_peft("llama", tmp_path), logits(model, "llama"))


@pytest.mark.parametrize("targets", [r".*layers\.1\..*\.(q_proj|fc2)",
                                     ["layers.0.self_attn.q_proj", "encoder_attn.v_proj"]])
def test_targets_by_regular_expression_and_by_path(targets, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    loaded("bart", tmp_path, from_peft("bart", config, tmp_path))


def test_layers_to_transform_and_excluded_modules(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], layers_to_transform=[1], layers_pattern="layer",
                             exclude_modules=["intermediate.dense"], task_type="SEQ_CLS")
    _, delta, _ = loaded("bert", tmp_path, from_peft("bert", config, tmp_path))
    assert {s.site.name for _, s in delta.slots} == {"encoder.1.attn.q", "encoder.1.attn.o", "encoder.1.mlp.down"}


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_norms_go_along_with_lora(family, tmp_path):
    model = tiny(family)
    delta = slimtune.attach(model, methods.LoRA(rank=2, norms="all"))
    shake(delta.parameters())
    save_peft(delta, tmp_path)
    close(in_peft(family, tmp_path), logits(model, family))
    again = slimtune.load(tiny(family), tmp_path)
    close(logits(again.model, family), logits(model, family))


def test_names_of_transformers_4(tmp_path):
    """A file of transformers 4, which peft cannot load any more; the oracle adds B A to the weights by hand."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    old = {"attention.attention.query": "attention.q_proj", "attention.attention.value": "attention.v_proj",
           "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    by_hand = tiny("vit")
    for i in range(2):
        for past, now in old.items():
            weight = by_hand.get_submodule(f"vit.layers.{i}.{now}").weight
            a, b = (torch.randn(shape, generator=g) * 0.3 for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
            weight.data += 3 / 2 * b @ a
            key = f"base_model.model.vit.encoder.layer.{i}.{past}.lora_"
            tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
    by_hand.classifier.weight.data.normal_(generator=g)
    tensors |= {f"base_model.model.classifier.{n}": p.data.clone() for n, p in by_hand.classifier.named_parameters()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["query", "value", "dense"],
              "modules_to_save": ["classifier"], "bias": "none", "fan_in_fan_out": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="No modules were targeted"):
        peft.PeftModel.from_pretrained(tiny("vit"), tmp_path)
    _, delta, _ = loaded("vit", tmp_path, logits(by_hand, "vit"))
    assert delta.methods[0].sites == ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down")
    save_peft(delta, tmp_path / "new")
    close(in_peft("vit", tmp_path / "new"), logits(by_hand, "vit"))


def test_a_head_that_peft_left_out_in_part(tmp_path):
    """DistilBERT's pre_classifier stays the model's own; the user is told."""
    model = tiny("distilbert")
    delta = slimtune.attach(model, methods.LoRA(rank=2))
    shake(delta.parameters())
    save_peft(delta, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pre_classifier" not in k}, path)
    other = tiny("distilbert")
    with pytest.warns(UserWarning, match=r"pre_classifier\.weight"):
        loaded_delta = slimtune.load(other, tmp_path)
    state = loaded_delta.state()
    assert torch.equal(state["head.pre_classifier.weight"], tiny("distilbert").pre_classifier.weight)
    assert torch.equal(state["head.classifier.weight"], delta.state()["head.classifier.weight"])


def test_beside_another_delta(tmp_path):
    want = from_peft("bert", peft.LoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS"), tmp_path)
    model = tiny("bert")
    first = slimtune.attach(model, methods.LoRA(rank=2, norms="all"), name="first")
    shake(first.parameters())
    mine = logits(model, "bert")
    slimtune.load(model, tmp_path, name="second")
    close(logits(model, "bert"), want)
    first.activate()
    assert torch.equal(logits(model, "bert"), mine)
    save_peft(first, tmp_path / "first")
    close(in_peft("bert", tmp_path / "first"), mine)


def test_a_delta_of_peft_is_saved_in_our_folder(tmp_path):
    want = from_peft("t5", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), tmp_path / "theirs")
    slimtune.load(tiny("t5"), tmp_path / "theirs", name="mine").save(tmp_path / "ours")
    model = tiny("t5")
    delta = slimtune.load(model, tmp_path / "ours")
    assert delta.name == "mine"
    assert delta.info["peft"]["peft_type"] == "PREFIX_TUNING"
    close(logits(model, "t5"), want)
