"""Tiny backbones: one of every family, two blocks, width 32, random and the same in every process."""
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
         "max_position_embeddings": 64}
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "image_size": 16, "patch_size": 4}
_DINO = {k: v for k, v in _IMAGE.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
       "decoder_start_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
         "forced_eos_token_id": None, **_SPECIAL}
_CAUSAL = {"num_key_value_heads": 2, **_SPECIAL}

_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, **_SPECIAL}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig",
                   {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99,
                    "max_position_embeddings": 64}),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", {**_TEXT, **_SPECIAL}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                   {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                    "share_att_key": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99,
                                               "n_positions": 64, "n_inner": 64, **_SPECIAL}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, **_CAUSAL}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, **_CAUSAL}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_TEXT, **_CAUSAL}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE),
    "beit": ("BeitForImageClassification", "BeitConfig",
             {**_IMAGE, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _DINO),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                              {**_DINO, "num_register_tokens": 2}),
    "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 16,
                                                          "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}),
    "clip": ("CLIPModel", "CLIPConfig", {"projection_dim": 16}),
}

NAMES = tuple(_TABLE)


def tiny(name: str, seed: int = 0, dropout: bool = False, **changes: Any) -> nn.Module:
    """A tiny model of a family, in eval mode, with three labels where it classifies. No network, no files.

    dropout: keep the family's default rates. Errors: KeyError for an unknown family (see NAMES).
    Example:
        >>> sum(p.numel() for p in tiny("llama").parameters()) < 50_000
        True
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    model_class, config_class, values = _TABLE[name]
    values = {**values, **changes}
    if name == "clip":
        values |= {"text_config": {**_TEXT, **_SPECIAL}, "vision_config": _IMAGE}
    if "Classification" in model_class:
        values["num_labels"] = values.get("num_labels", 3)
    config = getattr(transformers, config_class)(**values)
    if not dropout:
        _without_dropout(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for p in model.parameters():  # biases, norms and tables away from 0 and 1, so that a mistake shows
            if p.dim() == 1 or not p.any():
                with torch.no_grad():
                    p.add_(torch.randn_like(p) * 0.02)
    return model.eval()


def _without_dropout(config: Any) -> None:
    for c in (config, *(getattr(config, n) for n in ("text_config", "vision_config") if hasattr(config, n))):
        for key, value in vars(c).items():
            if "drop" in key and isinstance(value, float):
                setattr(c, key, 0.0)


def batch(name: str, size: int = 3, seed: int = 0, labels: bool = True, tokens: int = 7) -> dict[str, Tensor]:
    """Inputs for a tiny model: the last example padded, labels where the model has a loss.

    Example:
        >>> sorted(batch("bert"))
        ['attention_mask', 'input_ids', 'labels']
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (size, tokens), generator=g)
    mask = torch.ones_like(ids)
    mask[-1, tokens - 2:] = 0
    ids[-1, tokens - 2:] = 1
    text = {"input_ids": ids, "attention_mask": mask}
    pixels = {"pixel_values": torch.randn(size, 3, 16, 16, generator=g)}
    classes = {"labels": torch.arange(size) % 3}
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "image": lambda: {**pixels, **classes}, "classify": lambda: {**text, **classes},
        "lm": lambda: {**text, "labels": ids.masked_fill(mask == 0, -100)},
        "clip": lambda: {**text, **pixels},
    }
    made = makers[kind(name)]()
    return made if labels else {k: v for k, v in made.items() if k != "labels"}


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs whose floats are float64, for a model in double.

    Example:
        >>> doubled(batch("vit"))["pixel_values"].dtype
        torch.float64
    """
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def kind(name: str) -> str:
    """What a tiny model does: "classify", "lm", "image" or "clip"."""
    if name == "clip":
        return "clip"
    if name in ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "swin"):
        return "image"
    return "lm" if name in ("gpt2", "llama", "qwen2", "mistral", "t5", "bart") else "classify"


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a forward, of any tiny model."""
    out = model(**inputs)
    return torch.cat([out.text_embeds, out.image_embeds]) if hasattr(out, "text_embeds") else out.logits


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The task loss; for CLIP, the contrastive one."""
    return model(**inputs).loss if "labels" in inputs else model(**inputs, return_loss=True).loss
