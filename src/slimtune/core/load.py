"""Load a delta's folder onto a model: verified first, then attached; nothing is changed if it does not fit."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy, dissect
from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.deltafile import read_delta
from slimtune.core.fingerprint import fingerprint
from slimtune.core.insert import CHILD, LOCK, Root
from slimtune.core.labels import Labels
from slimtune.core.mask import set_masks, unpacked
from slimtune.core.method import Method, from_config
from slimtune.core.switch import set_active
from slimtune.core.unfreeze import base_parameters, restore
from slimtune.errors import DeltaError, SlimtuneError


def load_delta(model: nn.Module, folder: Path | str, name: str | None = None, labels: Labels = "model") -> Delta:
    """The delta of one of our folders, on the model it was made for, active.

    Errors: DeltaError for a folder that does not verify, another base, or tensors that do not fit.
    """
    info, tensors = read_delta(folder)
    root = model._modules.get(CHILD)
    anatomy = (root.anatomy if isinstance(root, Root) else None) or dissect(model)
    _check_base(model, anatomy, info, folder)
    try:
        tensors, masks = unpacked(tensors, info.get("masks"))
        state = _values(model, info, tensors, masks)
        with LOCK:  # no route opens on a delta without its masks
            before = (root.plan.active, root.plan.weights) if isinstance(root, Root) else ((), {})
            delta = attach(model, _methods(info, folder), name or str(info.get("name") or "default"),
                           seed=int(info.get("seed", 0)), anatomy=anatomy, state=state, labels=labels)
            try:
                if masks:
                    set_masks(delta, masks)
                _check_counts(delta, info.get("counts"))
            except DeltaError:
                delta.detach()
                if isinstance(root, Root):
                    set_active(root, *before)
                raise
    except DeltaError as error:
        raise DeltaError(f"{folder}: {error.what}", *error.more) from None
    delta.info = dict(info.get("info") or {})
    return delta


def _check_counts(delta: Delta, told: Any) -> None:
    counts, told = delta.count().as_dict(), told if isinstance(told, dict) else {}
    if any(told.get(part) != counts[part] for part in ("stored", "norms", "head", "backbone")):
        # what was trained may have been more: a reparametrisation is not stored
        raise DeltaError("its counts are not those of its tensors.", f"It says {told}, and holds {counts}.",
                         "Nothing was loaded.")


def _methods(info: Mapping[str, Any], folder: Path | str) -> list[Method]:
    configs = info.get("methods")
    if not isinstance(configs, list) or not configs:
        raise DeltaError("delta.json names no method.", "Nothing was loaded.")
    try:
        return [from_config(c) for c in configs]
    except SlimtuneError as error:
        raise DeltaError(error.what, *error.more, "Nothing was loaded.") from None


def _check_base(model: nn.Module, anatomy: Anatomy, info: Mapping[str, Any], folder: Path | str) -> None:
    told, own = info.get("base"), fingerprint(model, anatomy)
    if not isinstance(told, dict) or not told.get("shapes"):
        raise DeltaError(f"{folder}: delta.json has no fingerprint of its base.", "Nothing was loaded.")
    parts = ["shapes", "exact" if info.get("differences") or info.get("masks") else "rounded"]
    for part in parts:
        if part in told and part in own and told[part] != own[part]:
            what = "the shapes of its tensors" if part == "shapes" else "the values of its tensors"
            raise DeltaError(f"{folder}: this delta was made for another base ({info.get('model_type')}): "
                             f"{what} differ.", "Load the very model it was trained on; nothing was loaded.")
    if set(own) != set(told):
        raise DeltaError(f"{folder}: the fingerprint of its base is incomplete.", "Nothing was loaded.")


def _values(model: nn.Module, info: Mapping[str, Any], tensors: Mapping[str, Tensor],
            masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the base from their differences; everything else as it is."""
    differences = info.get("differences")
    if not isinstance(differences, list):
        raise DeltaError("delta.json does not say which tensors are differences.", "Nothing was loaded.")
    root = model._modules.get(CHILD)
    swapped = {id(o.value): o.base for d in (root.deltas.values() if isinstance(root, Root) else ()) for o in d.owned}
    bases = {f"own.{path}": swapped.get(id(p), p) for path, p in base_parameters(model).items()} if differences else {}
    values = dict(tensors)
    for key in differences:
        base, diff = bases.get(key), tensors.get(key)
        if base is None or diff is None or base.shape != diff.shape:
            raise DeltaError(f"{key} is no difference from a tensor of this model.", "Nothing was loaded.")
        values[key] = restore(diff.to(base.device), base)
        if key in masks:  # what does not live has no difference in the file
            values[key] = values[key].masked_fill(~masks[key].to(base.device), 0)
        if not bool(values[key].isfinite().all()):
            raise DeltaError(f"{key} holds NaN or infinite values.", "Nothing was loaded.")
    return values
