"""convert: a delta from PEFT's or AdapterHub's folder to ours or back, loaded again before it is called done."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimtune.core import Delta, deltas
from slimtune.core.deltafile import read_delta
from slimtune.core.load import load_delta
from slimtune.errors import DeltaError, SlimtuneError, listing
from slimtune.io.adapterhub import is_adapterhub, load_adapterhub, save_adapterhub
from slimtune.io.adapterhub_folder import read_adapter, read_head
from slimtune.io.models import Task, load_model
from slimtune.io.peft import is_peft, load_peft, save_peft
from slimtune.io.peft_folder import read_peft

Format = Literal["peft", "adapterhub", "slimtune"]
_TASKS: dict[str, Task] = {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification", "CAUSAL_LM": "causal_lm",
                           "SEQ_2_SEQ_LM": "seq2seq"}
_HUB_TASKS: dict[str, Task] = {
    "ForSequenceClassification": "classification", "ForTokenClassification": "token_classification",
    "LMHeadModel": "causal_lm", "ForCausalLM": "causal_lm", "ForConditionalGeneration": "seq2seq",
    "classification": "classification", "tagging": "token_classification", "causal_lm": "causal_lm",
    "seq2seq_lm": "seq2seq"}
"""By the ending of a class of transformers, or the library's own type of head."""
_READ: dict[Format, Callable[..., Delta]] = {"peft": load_peft, "adapterhub": load_adapterhub, "slimtune": load_delta}
_WRITE: dict[Format, Callable[[Delta, Path], None]] = {"peft": save_peft, "adapterhub": save_adapterhub,
                                                       "slimtune": Delta.save}


@dataclass(frozen=True)
class Converted:
    """What was written."""

    format: Format
    tensors: int
    size: int


def convert(source: Path, target: Path, to: Format | None = None, model: str | None = None) -> Converted:
    """Read a delta of any format, write it in another (ours by default, and ours in PEFT's), and load what was written.

    Errors: DeltaError for a folder of no known format, a method the other does not have, or a target that is in use;
    SlimtuneError when the model it was made for is not told and not known.
    """
    kind: Format = ("slimtune" if not is_peft(source) or (source / "delta.json").is_file() else
                    "adapterhub" if is_adapterhub(source) else "peft")
    home = source if kind != "slimtune" or (source / "delta.json").is_file() else source / "delta"
    if kind == "slimtune" and not (home / "delta.json").is_file():
        there = listing(sorted(p.name for p in source.iterdir()), 12) if source.is_dir() else ""
        raise DeltaError(f"{source}: no delta: neither delta.json nor adapter_config.json is there.",
                         f"It has: {there}" if there else "There is no such folder.")
    to = to or ("peft" if kind == "slimtune" else "slimtune")
    name, task, labels = {"peft": _peft_base, "adapterhub": _hub_base, "slimtune": _own_base}[kind](home)
    name = model or name
    if not name:
        raise SlimtuneError(f"{source}: does not say which model it was trained on.", "Give it: --model MODEL")
    net = load_model(name, task, **labels)
    delta = _READ[kind](net, home, "converted")
    delta.info |= {"task": task, "model": name}
    _WRITE[to](delta, target)
    tensors = len(delta.state())
    delta.detach()
    assert not deltas(net)
    again = _READ[to](net, target, "converted")
    again.detach()
    return Converted(to, tensors, sum(p.stat().st_size for p in target.iterdir()))


def _peft_base(folder: Path) -> tuple[str | None, Task, dict[str, Any]]:
    """The model, task and labels that a PEFT folder tells of; the labels by the shape of its saved head."""
    config, tensors = read_peft(folder)
    heads = [t.shape[0] for key, t in tensors.items()
             if t.dim() == 2 and key.split(".")[-2] in ("classifier", "score", "out_proj")]
    task = _TASKS.get(str(config.get("task_type")), "classification" if heads else "causal_lm")
    labels = {"num_labels": heads[-1]} if heads and task in ("classification", "token_classification") else {}
    return config.get("base_model_name_or_path"), task, labels


def _hub_base(folder: Path) -> tuple[str | None, Task, dict[str, Any]]:
    """The same of an AdapterHub folder, by the class it was saved from and its head's own numbers."""
    config, head = read_adapter(folder)[0], read_head(folder)
    top = head[0] if head is not None else config
    given = top.get("config")
    fields: dict[str, Any] = given if isinstance(given, dict) else {}
    said = str(fields.get("head_type") if head is not None and fields else top.get("model_class"))
    tasks: list[Task] = [task for end, task in _HUB_TASKS.items() if said.endswith(end)]
    task: Task = tasks[0] if tasks else "classification"
    count = fields.get("num_labels", top.get("num_labels")) if head is not None else None
    labelled = isinstance(count, int) and task in ("classification", "token_classification")
    return config.get("model_name"), task, {"num_labels": count} if labelled else {}


def _own_base(folder: Path) -> tuple[str | None, Task, dict[str, Any]]:
    told: dict[str, Any] = read_delta(folder)[0].get("info") or {}
    peft, hub = told.get("peft") or {}, told.get("adapterhub") or {}
    task: Task = told.get("task") or _TASKS.get(str(peft.get("task_type")), "classification")
    return told.get("model") or peft.get("base_model_name_or_path") or hub.get("model_name"), task, (
        {"label_names": told["labels"]} if told.get("labels") else {})
