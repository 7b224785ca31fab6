"""Write one of our deltas as a PEFT folder that `peft.PeftModel.from_pretrained` loads to the same logits."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD
from slimtune.core.method import key_of, to_config
from slimtune.errors import DeltaError, listing
from slimtune.io.peft_folder import base_name, write_peft
from slimtune.io.peft_layout import Layout, ia3_layout, lora_layout, norm_layout, whole_module
from slimtune.io.peft_names import NORM
from slimtune.io.peft_prompts import MATRIX, pools_the_prompt, write_prefix, write_prompt
from slimtune.methods.ia3 import IA3
from slimtune.methods.lora import LoRA
from slimtune.methods.norm_tuning import NormTuning
from slimtune.methods.prefix_tuning import PrefixTuning
from slimtune.methods.prompt_tuning import PromptTuning

TYPES = {LoRA: "LORA", IA3: "IA3", PrefixTuning: "PREFIX_TUNING", PromptTuning: "PROMPT_TUNING",
         NormTuning: "LN_TUNING"}
_KEEP = "Keep the delta in slimtune's own folder."
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
          "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS",
          "ForQuestionAnswering": "QUESTION_ANS"}


def save_peft(delta: Delta, folder: Path | str) -> None:
    """Write a delta as PEFT does: LoRA, IA3, prefix, prompt or norm tuning, with its norms and head.

    Slices of a fused projection become one adapter of PEFT on the whole module: LoRAs of rank r on two slices
    become one of rank 2 r, B block by block, alpha scaled so that the product is the same. The head and norms go
    into `modules_to_save`. The folder appears whole or not at all.

    Errors: DeltaError for a method, site or tensor that PEFT has no counterpart for; nothing is written then.
    Example:
        >>> import tempfile
        >>> from slimtune.core import attach
        >>> from slimtune.io.peft import load_peft
        >>> from slimtune.testing import tiny
        >>> with tempfile.TemporaryDirectory() as home:
        ...     save_peft(attach(tiny("gpt2"), LoRA(rank=2, sites=("attn.q",))), home + "/sst2")
        ...     load_peft(tiny("gpt2"), home + "/sst2").methods[0].sites
        ('attn.q', 'attn.k', 'attn.v')
    """
    delta._alive()
    kind = _kind(delta)
    paths = [p for p, _ in delta.model.named_modules() if p and CHILD not in p.split(".")]
    norms, heads = _owned(delta)
    if kind in ("PREFIX_TUNING", "PROMPT_TUNING"):
        fields, tensors = _prompt(delta, kind)
    elif kind == "LN_TUNING":
        fields, tensors = norm_layout(delta, norms, paths)
        norms = []
    else:
        fields, tensors = lora_layout(delta, paths) if kind == "LORA" else ia3_layout(delta, paths)
    for path in [*norms, *heads]:
        tensors |= {f"{path}.{n}": value for n, value in whole_module(delta, path).items()}
    config = {"peft_type": kind, "task_type": _task(delta, kind, heads), "inference_mode": True,
              "base_model_name_or_path": base_name(delta.model), "modules_to_save": [*norms, *heads] or None, **fields}
    prefix = "base_model." if MATRIX in tensors else "base_model.model."
    named = {name if name == MATRIX else prefix + name: value for name, value in tensors.items()}
    write_peft(folder, config, named, {"format": "peft", "methods": [to_config(m) for m in delta.methods],
                                       "info": delta.info})


def _kind(delta: Delta) -> str:
    classes = list(dict.fromkeys(type(m) for m in delta.methods))
    for cls in classes:
        if cls not in TYPES:
            raise DeltaError(f"PEFT has no counterpart of {cls.__name__}.",
                             f"It can take: {listing(key_of(c) for c in TYPES)}.", _KEEP)
    rest = [c for c in classes if c is not NormTuning] or classes  # norms go with any of the others
    if len(rest) > 1 or (rest[0] in (PrefixTuning, PromptTuning) and len(delta.methods) > 1):
        raise DeltaError(f"a PEFT folder holds one method, and this delta is a union: "
                         f"{' + '.join(type(m).__name__ for m in delta.methods)}.", _KEEP)
    return TYPES[rest[0]]


def _owned(delta: Delta) -> tuple[list[str], list[str]]:
    """The modules of the base that the delta owns tensors of: norms, and heads."""
    known = {s.path for s in delta.anatomy.sites if s.role.startswith(NORM)}
    norms: dict[str, None] = {}
    for own in delta.owned:
        path = own.path.rpartition(".")[0]
        if own.group == "head":
            continue
        if path not in known:
            raise DeltaError(f"PEFT has no counterpart of the trained tensor {own.path}.",
                             _KEEP)
        norms[path] = None
    owned = [o.path for o in delta.owned if o.group == "head"]
    return list(norms), [h for h in delta.anatomy.heads if any(path.startswith(f"{h}.") for path in owned)]


def _prompt(delta: Delta, kind: str) -> Layout:
    method, state = delta.methods[0], delta.state()
    if isinstance(method, PrefixTuning):
        final = method.final([slot for _, slot in delta.slots])
        fields, matrix = write_prefix(delta.anatomy, method, state if final is None else final[1])
    else:
        assert isinstance(method, PromptTuning)
        if pools_the_prompt(_class_task(delta), delta.anatomy):
            raise DeltaError(f"PEFT would classify by the prompt's first token on {delta.anatomy.model_type}, and this "
                             "delta by the text's: the logits would differ.", _KEEP)
        fields, matrix = write_prompt(delta.anatomy, method, state)
    tensors: dict[str, Tensor] = {MATRIX: matrix}
    return fields, tensors


def _class_task(delta: Delta) -> str | None:
    name = type(delta.model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def _task(delta: Delta, kind: str, heads: Sequence[str]) -> Any:
    """PEFT's task; it decides how a prompt is run, and for classification demands a head in the file."""
    task = _class_task(delta)
    if kind in ("PREFIX_TUNING", "PROMPT_TUNING"):
        return task or "FEATURE_EXTRACTION"
    return None if task in ("SEQ_CLS", "TOKEN_CLS") and not heads else task
