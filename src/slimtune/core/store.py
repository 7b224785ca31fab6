"""What of a delta goes into its file, and back: values for what is added, bit differences for the base's own."""
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimtune.core.deltafile import write_delta
from slimtune.core.fingerprint import fingerprint
from slimtune.core.mask import packed
from slimtune.core.method import to_config
from slimtune.core.unfreeze import difference

if TYPE_CHECKING:
    from slimtune.core.delta import Delta


def save(delta: "Delta", folder: Path | str, *, final: bool = True, overwrite: bool = True) -> None:
    """Write the delta's folder, in one step. `final` drops reparametrisations; a checkpoint keeps them."""
    for own in delta.owned:
        own.follow()
    methods, tensors = delta.methods, dict(delta.state())
    if final:
        methods, tensors = _final(delta, tensors)
    owned = {own.key: own for own in delta.owned if own.group not in ("head", "pruned")}
    tensors = {n: difference(t, owned[n].base) if n in owned else t for n, t in tensors.items()}
    info = {**describe(delta, methods), "differences": sorted(owned)}
    if delta.masks:
        tensors, info["masks"] = packed(delta, tensors)
    write_delta(folder, tensors, info, overwrite=overwrite, version=2 if delta.masks else 1)


def describe(delta: "Delta", methods: Any) -> dict[str, Any]:
    """The JSON of a delta: method, base, counts and whatever `delta.info` holds (task, labels, privacy)."""
    return {"methods": [to_config(m) for m in methods], "seed": delta.seed, "name": delta.name,
            "model_type": delta.anatomy.model_type, "base": fingerprint(delta.model, delta.anatomy),
            "counts": delta.count().as_dict(), "info": delta.info}


@torch.no_grad()
def _final(delta: "Delta", tensors: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    methods, kept = [], dict(tensors)
    for method, slots in delta.by_method():
        final = method.final(slots)
        methods.append(method if final is None else final[0])
        if final is not None:
            kept = {n: t for n, t in kept.items() if not delta.is_of(n, slots)} | final[1]
    return methods, kept
