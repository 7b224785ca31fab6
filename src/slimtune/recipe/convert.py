"""convert: a delta from PEFT's folder to ours or back, loaded again before it is called done."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimtune.core import Delta, deltas
from slimtune.core.deltafile import read_delta
from slimtune.core.load import load_delta
from slimtune.errors import DeltaError, SlimtuneError, listing
from slimtune.io.models import Task, load_model
from slimtune.io.peft import is_peft, load_peft, save_peft
from slimtune.io.peft_folder import read_peft

Format = Literal["peft", "slimtune"]
_TASKS: dict[str, Task] = {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification", "CAUSAL_LM": "causal_lm",
                           "SEQ_2_SEQ_LM": "seq2seq"}


@dataclass(frozen=True)
class Converted:
    """What was written."""

    format: Format
    tensors: int
    size: int


def convert(source: Path, target: Path, to: Format | None = None, model: str | None = None) -> Converted:
    """Read a delta of either format, write it in the other (or in `to`), and load what was written.

    Errors: DeltaError for a folder of neither format, a method PEFT does not have, or a target that is in use;
    SlimtuneError when the model it was made for is not told and not known.
    """
    peft = is_peft(source)
    home = source if peft or (source / "delta.json").is_file() else source / "delta"
    if not peft and not (home / "delta.json").is_file():
        there = listing(sorted(p.name for p in source.iterdir()), 12) if source.is_dir() else ""
        raise DeltaError(f"{source}: no delta: neither delta.json nor adapter_config.json is there.",
                         f"It has: {there}" if there else "There is no such folder.")
    to = to or ("slimtune" if peft else "peft")
    name, task, labels = _peft_base(home) if peft else _own_base(home)
    name = model or name
    if name is None:
        raise SlimtuneError(f"{source}: does not say which model it was trained on.", "Give it: --model MODEL")
    net = load_model(name, task, **labels)
    delta = load_peft(net, home, "converted") if peft else load_delta(net, home, "converted")
    delta.info |= {"task": task, "model": name}
    (save_peft if to == "peft" else Delta.save)(delta, target)
    tensors = len(delta.state())
    delta.detach()
    assert not deltas(net)
    again = load_peft(net, target, "converted") if to == "peft" else load_delta(net, target, "converted")
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


def _own_base(folder: Path) -> tuple[str | None, Task, dict[str, Any]]:
    told: dict[str, Any] = read_delta(folder)[0].get("info") or {}
    peft = told.get("peft") or {}
    task: Task = told.get("task") or _TASKS.get(str(peft.get("task_type")), "classification")
    return told.get("model") or peft.get("base_model_name_or_path"), task, (
        {"label_names": told["labels"]} if told.get("labels") else {})
