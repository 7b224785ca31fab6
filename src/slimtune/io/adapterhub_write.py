"""Write one of our deltas as a folder that the `adapters` library loads to the same logits."""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimtune.core.delta import Delta
from slimtune.core.method import to_config
from slimtune.errors import DeltaError
from slimtune.io.adapterhub_export import BOTTLENECKS, KEEP, Piece, export
from slimtune.io.adapterhub_folder import write_adapterhub
from slimtune.io.adapterhub_heads import write_head
from slimtune.io.adapterhub_names import Hub
from slimtune.io.peft_folder import base_name

VERSION = "adapters.1.3.0"
"""The version of the library whose format is written."""


def save_adapterhub(delta: Delta, folder: Path | str) -> None:
    """Write a delta as `adapters` does: bottlenecks, Compacter, LoRA, (IA)^3, prefixes and unions, with the head.

    Only safetensors are written, no pickle: load it with `model.load_adapter(folder, use_safetensors=True)`. A
    network that makes a prefix is dropped. The folder appears whole or not at all.

    Errors: DeltaError for a method, site or tensor that AdapterHub has no counterpart for, such as trained norms;
    nothing is written then.
    Example:
        >>> import tempfile
        >>> from slimtune.core import attach
        >>> from slimtune.io.adapterhub import load_adapterhub
        >>> from slimtune.methods import Houlsby
        >>> from slimtune.testing import tiny
        >>> with tempfile.TemporaryDirectory() as home:
        ...     save_adapterhub(attach(tiny("bert"), Houlsby(bottleneck=4, norms="none"), name="sst2"), home + "/sst2")
        ...     load_adapterhub(tiny("bert"), home + "/sst2")
        Delta('sst2': Houlsby on bert)
    """
    delta._alive()
    hub = Hub(delta.anatomy, str(folder))
    head = _head(delta)
    pieces = [piece for method, slots in delta.by_method() for piece in export(hub, method, slots)]
    _check_order(delta)
    _check_union(pieces)
    config = pieces[0].config if len(pieces) == 1 else {"architecture": "union", "configs": [p.config for p in pieces]}
    top = {"hidden_size": hub.width, "model_class": type(delta.model).__name__, "model_name": base_name(delta.model),
           "model_type": delta.anatomy.model_type, "version": VERSION}
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        for path, value in piece.tensors.items():
            if path in tensors and not torch.equal(tensors[path], value):
                raise DeltaError("AdapterHub shares one set of A_i in all of an adapter; this delta has several.", KEEP)
            tensors[path] = value
    named = {hub.root + path.format(delta.name): value for path, value in tensors.items()}
    top["name"] = delta.name
    beside = write_head(delta.model, delta.anatomy, delta.name, head, top) if head else None
    write_adapterhub(folder, ({**top, "config": config}, named), beside, {
        "format": "adapterhub", "methods": [to_config(m) for m in delta.methods], "info": delta.info})


def _head(delta: Delta) -> dict[str, Tensor]:
    """The head's values. Errors: DeltaError for other tensors of the base."""
    for own in delta.owned:
        if own.group != "head":
            raise DeltaError(f"AdapterHub has no place for the trained tensor {own.path}.",
                             "Train with norms='none' to export it." if own.group == "norms" else "", KEEP)
    return {own.path: own.value.detach() for own in delta.owned}


def _check_order(delta: Delta) -> None:
    """The library runs a linear layer's LoRA before the adapter behind that layer."""
    adapted: set[str] = set()
    for path, slot in delta.slots:
        if isinstance(slot.method, BOTTLENECKS):
            adapted.add(path)
        elif path in adapted and slot.kind == "output":
            raise DeltaError(f"the {type(slot.method).__name__} at {slot.site.name} runs behind an adapter, and in "
                             "AdapterHub before it.", "Put it first in the union.", KEEP)


def _check_union(pieces: Sequence[Piece]) -> None:
    """The library's own rules for a union. Errors: DeltaError for one that it would not take."""
    for i, a in enumerate(pieces):
        for b in pieces[:i]:
            if a.kind != b.kind:
                continue
            apart = a.kind is None and not a.places & b.places and not (a.config["phm_layer"] and b.config["phm_layer"])
            if not (apart and (a.config["leave_out"] or b.config["leave_out"] or all(
                    a.config[k] != b.config[k] for k in ("mh_adapter", "output_adapter")))):
                raise DeltaError("AdapterHub does not take this union: it has two configs of "
                                 f"{a.kind or 'bottlenecks'}.",
                                 "It takes one LoRA or (IA)^3, one prefix, one Compacter, and bottlenecks that share "
                                 "no layer.", KEEP)
