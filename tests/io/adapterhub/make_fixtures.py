"""Folders of AdapterHub by the real `adapters` library, with the logits that it gives: oracle of test_adapterhub.py.

Run in an environment of its own (adapters 1.3.0 cannot live beside transformers 5):

    pip install torch==2.13.0 adapters==1.3.0
    python tests/io/adapterhub/make_fixtures.py [FOLDER]

Each family is one tiny base (`<family>/base`, as transformers 4 saves it), its inputs and the logits of every case
(`<family>/expected.safetensors`), and a folder a case, with values as training leaves them.
"""
import shutil
import sys
import warnings
from pathlib import Path

import adapters
import torch
import transformers as tf
from adapters import (
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import save_file

TEXT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20,
        "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SEQ = {"d_model": 8, "vocab_size": 20, "decoder_start_token_id": 0}
FAMILIES = {
    "bert": ("BertForSequenceClassification", tf.BertConfig(**TEXT, num_labels=3)),
    "roberta": ("RobertaForSequenceClassification", tf.RobertaConfig(**TEXT, **IDS, num_labels=3)),
    "gpt2": ("GPT2LMHeadModel", tf.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_inner=12, vocab_size=20, n_positions=12,
                                              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS)),
    "t5": ("T5ForConditionalGeneration", tf.T5Config(**SEQ, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=2,
                                                     num_heads=2,
                                                     dropout_rate=0.0)),
    "bart": ("BartForConditionalGeneration", tf.BartConfig(
        **SEQ, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=12, dropout=0.0, forced_eos_token_id=None,
        **IDS)),
    "vit": ("ViTForImageClassification", tf.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}
NAMES = {"lora": LoRAConfig(r=2, alpha=5), "ia3": IA3Config(), "seq_bn": SeqBnConfig(reduction_factor=4),
         "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4), "par_bn": ParBnConfig(reduction_factor=4),
         "compacterpp": CompacterPlusPlusConfig(reduction_factor=2),
         "prefix": PrefixTuningConfig(prefix_length=3, bottleneck_size=4)}
MAM = MAMConfig(PrefixTuningConfig(prefix_length=2, bottleneck_size=4), ParBnConfig(reduction_factor=4))
CROSS = DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True)
STREAM = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=4, non_linearity="gelu",
                  original_ln_before=True, ln_before=True)
MANY = LoRAConfig(r=2, alpha=3, attn_matrices=["v", "k"], intermediate_lora=True, output_lora=True)
EVERY = {
    "scaled_par_bn": ParBnConfig(reduction_factor=4, scaling="learned"),
    "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "by_layer": DoubleSeqBnConfig(reduction_factor={"1": 2, "default": 4}, non_linearity="tanh", ln_before=True),
    "leave_out": SeqBnConfig(reduction_factor=4, leave_out=[0], non_linearity="gelu"),
    "ln_after": DoubleSeqBnConfig(reduction_factor=4, ln_after=True, scaling=0.5),
    "no_ln_after": SeqBnConfig(reduction_factor=4, original_ln_after=False, residual_before_ln=False, mh_adapter=True),
    "par_attn": ParBnConfig(reduction_factor=4, mh_adapter=True, output_adapter=False, ln_after=True),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=2, phm_rank=2),
    "phm_own": CompacterConfig(reduction_factor=2, shared_phm_rule=False, factorized_phm_W=False),
    "phm_factors": CompacterConfig(reduction_factor=2, shared_W_phm=True, factorized_phm_rule=True),
    "phm_no_bias": CompacterPlusPlusConfig(reduction_factor=2, phm_bias=False, scaling="learned"),
    "prefix_flat": PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[0]),
    "union": ConfigUnion(LoRAConfig(r=2, alpha=4, leave_out=[1]), SeqBnConfig(reduction_factor=4)),
    "mam": MAM, "lora_many": MANY,
}
FLAT = PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[2])
CASES = {
    "bert": {**NAMES, **EVERY},
    "roberta": {k: NAMES[k] for k in ("seq_bn", "lora", "prefix")},
    "gpt2": {**NAMES, "stream": STREAM, "mam": MAM, "lora_many": MANY, "adapter_plus": EVERY["adapter_plus"]},
    "t5": {**NAMES, "prefix": FLAT, "compacterpp": CompacterPlusPlusConfig(reduction_factor=2, shared_phm_rule=False),
           "stream": STREAM.replace(ln_before=False), "cross": CROSS},
    "bart": {**NAMES, "prefix": FLAT, "cross": CROSS, "mam": ConfigUnion(FLAT, NAMES["par_bn"])},
    "vit": {**NAMES, "stream": STREAM, "mam": MAM, "adapter_plus": EVERY["adapter_plus"]},
}
FLEXIBLE = {"bert": ("BertAdapterModel", "add_classification_head"),
            "roberta": ("RobertaAdapterModel", "add_classification_head"),
            "vit": ("ViTAdapterModel", "add_image_classification_head")}
SHARING = ("prefix", "prefix_flat", "mam", "by_layer", "stream")
"""Tensors under two names, which the library cannot save as safetensors; its .bin is used there, and on RoBERTa."""
WITH_HEAD = ("double_seq_bn", "lora")


@torch.no_grad()
def shake(module, wanted, seed):
    """Values as training leaves them: nothing is at its start."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if wanted in f".{name}":
            p.add_(torch.randn(p.shape, generator=g) * 0.3)


def inputs(family):
    g = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)}
    ids = torch.randint(3, 20, (2, 5), generator=g)
    mask = torch.ones_like(ids)
    mask[-1, 3:], ids[-1, 3:] = 0, 1
    given = {"input_ids": ids, "attention_mask": mask}
    if "t5" in family or "bart" in family:
        given["decoder_input_ids"] = torch.randint(3, 20, (2, 4), generator=g)
    return given


def fresh(family):
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(tf, name)._from_config(config, attn_implementation="eager")  # under sdpa it masks its own prefix
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() == 1 else 0.1))
    return model.eval()


def one(family, case, config, folder):
    """One case: added, shaken, saved, run. Returns its logits."""
    model = fresh(family)
    adapters.init(model)
    model.add_adapter(case, config=config)
    shake(model, f".{case}.", seed=len(case))
    model.set_active_adapters(case)
    safe = family != "roberta" and case not in SHARING
    model.save_adapter(str(folder), case, with_head=case in WITH_HEAD, use_safetensors=safe)
    return logits(model, family)


def flexible(family, base, folder):
    """An adapter on a model class of the library's own, with a head in its layout."""
    name, add = FLEXIBLE[family]
    model = getattr(adapters, name).from_pretrained(base, attn_implementation="eager").eval()
    model.config._name_or_path = ""  # or the file would hold this machine's path
    model.add_adapter("head", config=SeqBnConfig(reduction_factor=4))
    getattr(model, add)("head", num_labels=3)
    model.set_active_adapters("head")
    shake(model, ".head.", seed=9)
    model.save_adapter(str(folder), "head")
    return logits(model, family)


@torch.no_grad()
def logits(model, family):
    return model(**inputs(family)).logits.contiguous()


def main(home):
    for family, cases in CASES.items():
        shutil.rmtree(home / family, ignore_errors=True)
        model = fresh(family)
        model.save_pretrained(home / family / "base")
        (home / family / "base" / "generation_config.json").unlink(missing_ok=True)
        values = {f"inputs.{k}": v for k, v in inputs(family).items()} | {"logits.base": logits(model, family)}
        for case, config in cases.items():
            values[f"logits.{case}"] = one(family, case, config, home / family / case)
            assert not torch.allclose(values[f"logits.{case}"], values["logits.base"], atol=1e-3), (family, case)
        if family in FLEXIBLE:
            values["logits.head"] = flexible(family, home / family / "base", home / family / "head")
        save_file(values, home / family / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
