"""Backbones of real size on the meta device: shapes without weights, for counts in seconds.

No file is read: the configurations are transformers' own, with what the published models changed.
"""
import os
from typing import Any

import torch
from torch import nn

_SEQUENCE = "ForSequenceClassification"


def _build(model_class: str, config_class: str, **values: Any) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**values))


def bert_base_meta(**values: Any) -> nn.Module:
    """BERT-base uncased with a classifier of two labels: 109,482,240 without it.

    Example:
        >>> sum(p.numel() for p in bert_base_meta().bert.parameters())
        109482240
    """
    return _build("Bert" + _SEQUENCE, "BertConfig", **values)


def bert_large_meta(**values: Any) -> nn.Module:
    """BERT-large: 24 blocks of width 1,024."""
    return bert_base_meta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                          **values)


def roberta_base_meta(**values: Any) -> nn.Module:
    """RoBERTa-base with its classification head."""
    return _build("Roberta" + _SEQUENCE, "RobertaConfig", vocab_size=50265, max_position_embeddings=514,
                  type_vocab_size=1, **values)


def roberta_large_meta(**values: Any) -> nn.Module:
    """RoBERTa-large: 24 blocks of width 1,024."""
    return roberta_base_meta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                             **values)


def t5_base_meta(**values: Any) -> nn.Module:
    """T5-base, 12 and 12 blocks, 32,128 words: 222,903,552."""
    return _build("T5ForConditionalGeneration", "T5Config",
                  **{"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, **values})


def t5_large_meta(**values: Any) -> nn.Module:
    """T5-large, 24 and 24 blocks of width 1,024."""
    return t5_base_meta(**{"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, **values})


def t5_3b_meta(**values: Any) -> nn.Module:
    """T5-3B, 24 and 24 blocks of width 1,024, 32 heads of 128."""
    return t5_large_meta(**{"d_kv": 128, "d_ff": 16384, "num_heads": 32, **values})


def t5_xl_meta(**values: Any) -> nn.Module:
    """T5-XL v1.1, the size of T0-3B: 24 and 24 blocks of width 2,048, a gated feed-forward network."""
    return _build("T5ForConditionalGeneration", "T5Config", d_model=2048, d_kv=64, d_ff=5120, num_layers=24,
                  num_heads=32, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **values)


def bart_large_meta(**values: Any) -> nn.Module:
    """BART-large, 12 and 12 blocks of width 1,024."""
    return _build("BartForConditionalGeneration", "BartConfig", **values)


def gpt2_medium_meta(**values: Any) -> nn.Module:
    """GPT-2 medium, 24 blocks of width 1,024."""
    return _build("GPT2LMHeadModel", "GPT2Config", n_embd=1024, n_layer=24, n_head=16, **values)


def vit_b16_meta(**values: Any) -> nn.Module:
    """ViT-B/16 at 224 pixels with a classifier, without pooler: 85,798,656 without the classifier."""
    return _build("ViTForImageClassification", "ViTConfig", **values)


def swin_base_meta(**values: Any) -> nn.Module:
    """Swin-B at 224 pixels with a classifier: 24 blocks in four stages of width 128 to 1,024; 86,743,224 without it."""
    return _build("SwinForImageClassification", "SwinConfig", embed_dim=128, depths=[2, 2, 18, 2],
                  num_heads=[4, 8, 16, 32], **values)
