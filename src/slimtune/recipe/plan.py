"""plan: what a recipe would train, from shapes alone: the model is built on the meta device, the data is read."""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from slimtune.core import Count, Delta, attach
from slimtune.core.unfreeze import base_parameters
from slimtune.data import DataSpec, prepare
from slimtune.data.examples import Prepared
from slimtune.io.models import load_model
from slimtune.privacy.ledger import Ledger
from slimtune.recipe.reader import reader
from slimtune.recipe.tree import Recipe
from slimtune.train.pruning import check_pruning


@dataclass(frozen=True)
class Plan:
    """count: numbers trained and stored; memory: bytes; steps: data and steps, for people; notes: what it lacks."""

    count: Count
    memory: dict[str, int]
    steps: dict[str, str]
    notes: list[str] = field(default_factory=list)


def plan(recipe: Recipe) -> Plan:
    """Read the data if it is local, attach the method to the model's shapes, and count. Trains nothing.

    Errors: those that the run itself would begin with: DataError, SiteError, MethodError, SlimtuneError.
    """
    notes: list[str] = []
    data = None
    if is_local(recipe.data):
        data = prepare(recipe.data, reader(recipe.model, recipe.data))
    else:
        notes.append("the data is not on this machine and was not read: it has no steps here, and the head is "
                     "counted for the labels of data.labels, or those of the model's config")
    labels = data.label_names if data else recipe.data.labels or ()
    model = load_model(recipe.model, recipe.data.task, label_names=labels, meta=True)
    delta = attach(model, recipe.method, recipe.delta_name, seed=recipe.seed)
    check_pruning(delta, recipe.prune, recipe.train, recipe.privacy is not None)
    notes.append("activations are not estimated: `slimtune tune` reports the peak memory that it measured")
    needed = memory(model, delta)
    if recipe.privacy is not None:
        needed["gradients of examples"] = needed["gradients"] * recipe.train.batch_size
    if sum(needed.values()) - needed["delta file"] > (there := physical_memory()):
        notes.append(f"this is more memory than the {there / 1e9:.1f} GB of this machine")
    return Plan(delta.count(), needed, steps(recipe, data), notes)


def is_local(spec: DataSpec) -> bool:
    """Whether the data can be read without a network."""
    if spec.source == "files" or spec.layout:
        return True
    names = [spec.dataset] if spec.dataset else [s.partition(":")[0] for s in (spec.train, spec.test) if s]
    return all(Path(name).expanduser().is_dir() for name in names if name)


def memory(model: nn.Module, delta: Delta) -> dict[str, int]:
    """Bytes of weights, delta, gradients, optimizer state, and the delta's file."""
    state = delta.state()
    size = sum(t.nbytes for t in state.values())
    trained = sum(p.nbytes for p in delta.parameters())
    count = delta.count()
    held = sum(t.numel() for t in state.values())
    base = sum(p.nbytes for p in base_parameters(model).values()) + sum(b.nbytes for b in model.buffers())
    return {"backbone and head": base, "delta": size, "gradients": trained, "optimizer state": 2 * trained,
            "delta file": round(size * count.stored / max(held, 1)) + 8 + 120 * len(state)}


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where it does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def steps(recipe: Recipe, data: Prepared | None) -> dict[str, str]:
    """Examples and tokens of each split (or the size of its images), steps of an epoch and of the run."""
    told: dict[str, str] = {}
    if data is None:
        return told | ({"steps": f"{recipe.train.steps:,}"} if recipe.train.steps else {})
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if split is not None:
            cut = f", {split.cut:,} cut to {recipe.data.max_length} tokens" if split.cut else ""
            told[name] = f"{len(split):,} examples, {split.tokens:,} tokens{cut}" if data.images is None else (
                f"{len(split):,} images")
    if data.images is not None:
        told["images"] = f"{data.images['size']} x {data.images['size']}, {data.images['normalize']}"
    if data.label_names:
        told["labels"] = f"{len(data.label_names)}"
    if data.train is not None:
        batch = (recipe.privacy and recipe.privacy.batch_size) or recipe.train.batch_size
        each = steps_of_epoch(len(data.train), batch, recipe.train.gradient_accumulation)
        number = recipe.train.steps or math.ceil(each * recipe.train.epochs)
        told |= {"steps an epoch": f"{each:,}", "steps": f"{number:,}"}
        if recipe.privacy is not None:
            ledger = Ledger(recipe.privacy, len(data.train), batch, number)
            told["privacy"] = (f"epsilon {ledger.of(number):.3f} at delta {recipe.privacy.delta}: sigma "
                               f"{ledger.sigma:.4f}, sampling rate {ledger.rate:.3g}")
    return told


def steps_of_epoch(examples: int, batch: int, accumulation: int) -> int:
    """Optimizer steps of one pass over the data.

    Example:
        >>> steps_of_epoch(100, 16, 2)
        4
    """
    return max(math.ceil(math.ceil(examples / batch) / accumulation), 1)
