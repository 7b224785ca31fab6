"""Shared by the tests of PEFT's folders: the real peft, trained-like values, and logits that can be compared."""
import warnings

import torch

from slimtune.testing import batch, output, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

LORA = {"bert": ["query", "value"], "roberta": ["query", "value", "dense"], "distilbert": ["q_lin", "v_lin", "lin1"],
        "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"],
        "bart": ["q_proj", "v_proj", "fc1"], "vit": ["q_proj", "v_proj", "fc2"]}
IA3 = {"bert": (["key", "value", "output.dense"], ["output.dense"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
       "roberta": (["key", "value", "output.dense"], ["output.dense"]), "t5": (["k", "v", "wo"], ["wo"]),
       "distilbert": (["k_lin", "v_lin", "lin2"], ["lin2"]),
       "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "bart": (["k_proj", "v_proj", "fc2"], ["fc2"]),
       "vit": (["k_proj", "v_proj", "fc2"], ["fc2"])}
FAMILIES = list(LORA)
CAUSAL, SEQ2SEQ = ("gpt2", "llama"), ("t5", "bart")
TOKENS = 7


def task(family):
    if family == "vit":
        return None
    return "CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "SEQ_CLS"


def inputs(family):
    return batch(family, labels=family in SEQ2SEQ, tokens=TOKENS)


@torch.no_grad()
def logits(model, family):
    """Logits of the text alone: PEFT leaves those of a prompt in front."""
    out = output(model, inputs(family))
    return out[:, -TOKENS:] if out.dim() == 3 else out


@torch.no_grad()
def shake(parameters, seed=1, by=0.3):
    """Values as training leaves them: nothing is at its start."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=g) * by)


def from_peft(family, config, folder, **changes):
    """A PEFT folder with trained-like values; returns the logits that peft gives with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(family, **changes), config).eval()
        shake(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(folder)
        return logits(model, family)


def in_peft(family, folder, **changes):
    """The logits that the real peft gives with a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(tiny(family, **changes), folder).eval(), family)
