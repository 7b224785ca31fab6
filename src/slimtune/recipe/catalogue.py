"""What there is: methods with their sources, their counts on a model, a model's anatomy, a delta's summary."""
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.core import Anatomy, Count, attach, dissect
from slimtune.core.deltafile import read_delta
from slimtune.errors import SlimtuneError, listing
from slimtune.io.models import find_model, load_model
from slimtune.methods import Method, registered


@dataclass(frozen=True)
class Entry:
    """A method as the list shows it; year and paper are read from its module's `Source:`."""

    name: str
    year: str
    primitive: str
    trains: str
    paper: str


def catalogue() -> list[Entry]:
    """Every registered method, also those of third parties.

    Example:
        >>> next(e.year for e in catalogue() if e.name == "lora")
        '2021'
    """
    return [_entry(name, cls) for name, cls in registered().items()]


def _entry(name: str, cls: type[Method]) -> Entry:
    about = sys.modules[cls.__module__].__doc__ or ""
    found = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\Z)", about, re.DOTALL)
    source = " ".join(found[1].split()) if found else ""
    year = re.search(r"\b(19|20)\d\d\b(?=,)", source)
    arxiv = re.search(r"arXiv \d{4}\.\d{4,5}", source)
    author = re.split(r",? and | et al\.|,", source.replace("the baseline of every paper here; ", ""))[0]
    paper = " ".join(part for part in (f"{author} et al." if " et al." in source else author,
                                       arxiv[0] if arxiv else "") if part)
    return Entry(name, year[0] if year else "", cls.primitive, (cls.__doc__ or "").strip().split("\n")[0].rstrip("."),
                 paper)


def counts(model: str) -> tuple[str, dict[str, Count | str]]:
    """What is counted, and the counts of each method with its defaults; a text where it cannot go.

    Shapes only: no weights are read. Errors: SlimtuneError for an unknown model.
    """
    net = skeleton(model)
    found: dict[str, Count | str] = {}
    for name, cls in registered().items():
        try:
            delta = attach(net, cls())
        except (SlimtuneError, NotImplementedError) as error:
            found[name] = str(error).splitlines()[0]
        else:
            found[name] = delta.count()
            delta.detach()
    return f"{type(net).__name__} ({model})", found


def skeleton(model: str) -> nn.Module:
    """A model's shapes, on the meta device: as a classifier of two labels where it can be one, else bare."""
    try:
        return load_model(model, "classification", num_labels=2, meta=True)
    except SlimtuneError:
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
