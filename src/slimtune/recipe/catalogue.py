"""What there is: the methods' counts on a model, a model's anatomy, a delta's summary."""
import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.core import Anatomy, Count, attach, dissect
from slimtune.core.deltafile import read_delta
from slimtune.errors import SlimtuneError, listing
from slimtune.io.models import Task, find_model, load_model
from slimtune.methods import Method, registered


def counts(model: str) -> tuple[str, dict[str, Count | str]]:
    """What is counted, and the counts of each method with its defaults; a text where it cannot go.

    Shapes only: no weights are read. Errors: SlimtuneError for an unknown model.
    """
    net = skeleton(model)
    anatomy = dissect(net)
    found = {name: count_of(net, cls, anatomy) for name, cls in registered().items()}
    return f"{type(net).__name__} ({model})", {
        name: count if isinstance(count, Count) else reason(count) for name, count in found.items()}


def count_of(net: nn.Module, cls: type[Method], anatomy: Anatomy, **values: Any) -> Count | Exception:
    """The count of a method on a model's shapes, or why it cannot go there; the model is left as it was."""
    try:
        delta = attach(net, cls(**values), anatomy=anatomy)
    except (SlimtuneError, NotImplementedError) as error:
        return error
    count = delta.count()
    delta.detach()
    return count


def reason(error: Exception) -> str:
    """The first line of an error, in place of a count."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def skeleton(model: str) -> nn.Module:
    """A model's shapes, on the meta device: as a classifier (of texts or images) of two labels, else bare."""
    tasks: tuple[Task, ...] = ("classification", "image_classification")
    for task in tasks:
        with contextlib.suppress(SlimtuneError):
            return load_model(model, task, num_labels=2, meta=True)
    return bare(model)


def bare(model: str) -> nn.Module:
    """A model's shapes without a task head. Errors: SlimtuneError."""
    import transformers

    source = find_model(model)
    try:
        config = transformers.AutoConfig.from_pretrained(str(source), local_files_only=isinstance(source, Path),
                                                         trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config, trust_remote_code=False).eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SlimtuneError(f"{source}: transformers cannot build this model: {reason}") from None


def anatomy_of(model: str) -> Anatomy:
    """The towers, blocks and sites of a model; no weights are read. Errors: SlimtuneError."""
    return dissect(skeleton(model))


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta, or is a run that does."""
    return any((folder / name).is_file() for name in ("delta.json", "delta/delta.json"))


def delta_summary(folder: Path) -> list[tuple[str, str]]:
    """What a delta's folder says of itself, verified. Errors: DeltaError."""
    home = folder if (folder / "delta.json").is_file() else folder / "delta"
    manifest, tensors = read_delta(home)
    told: dict[str, Any] = manifest.get("info") or {}
    rows = [("folder", str(home)), ("name", str(manifest.get("name"))), ("base", str(manifest.get("model_type")))]
    rows += [(key, str(told[key])) for key in ("model", "task", "max_length") if key in told]
    if told.get("labels"):
        rows.append(("labels", listing(map(str, told["labels"]), 12)))
    for method in manifest.get("methods", []):
        values = " ".join(f"{k}={_short(v)}" for k, v in method.items() if k != "name" and v is not None)
        rows.append((str(method.get("name")), values))
    rows += [(key, f"{number:,}") for key, number in (manifest.get("counts") or {}).items()]
    rows += [("tensors", f"{len(tensors)}"), ("bytes", f"{sum(t.nbytes for t in tensors.values()):,}")]
    return rows


def _short(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
