"""Our methods as parts of an AdapterHub config, each with its tensors: the way back of bottleneck and linear."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimtune.core import PHM, Adapter
from slimtune.core.insert import Slot
from slimtune.core.method import Method, key_of
from slimtune.core.sites import Site
from slimtune.errors import DeltaError, listing
from slimtune.io.adapterhub_bottleneck import Order
from slimtune.io.adapterhub_config import ACTIVATIONS, Bottleneck, Lora, Prefix
from slimtune.io.adapterhub_linear import check_relative, chosen, wanted
from slimtune.io.adapterhub_names import LINEARS, PLACES, Hub
from slimtune.io.adapterhub_stream import StreamAdapter, StreamCompacter
from slimtune.methods.adapter_drop import AdapterDrop
from slimtune.methods.bottleneck_adapter import BottleneckAdapter
from slimtune.methods.compacter import Compacter
from slimtune.methods.compacter_plus_plus import CompacterPlusPlus
from slimtune.methods.houlsby import Houlsby
from slimtune.methods.ia3 import IA3
from slimtune.methods.lora import LoRA
from slimtune.methods.parallel_adapter import ParallelAdapter
from slimtune.methods.pfeiffer import Pfeiffer
from slimtune.methods.phm_adapter import PHMAdapter
from slimtune.methods.prefix_tuning import PrefixTuning
from slimtune.methods.scaled_parallel_adapter import ScaledParallelAdapter

BOTTLENECKS = (Houlsby, Pfeiffer, BottleneckAdapter, ParallelAdapter, ScaledParallelAdapter, AdapterDrop, Compacter,
               CompacterPlusPlus, PHMAdapter, StreamAdapter, StreamCompacter)
METHODS = (*BOTTLENECKS, LoRA, IA3, PrefixTuning)
KEEP = "Keep the delta in slimtune's own folder."
FLAGS: dict[Order, tuple[bool, bool, bool]] = {"sub": (False, True, True), "stream": (True, True, True),
                                               "norm": (True, False, False), "parallel": (False, True, True)}
"""original_ln_before, original_ln_after, residual_before_ln of each order."""
_START = {"init_weights_seed": None, "use_gating": False}
_BOTTLENECK = {**_START, "init_weights": "bert", "inv_adapter_reduction_factor": None, "phm_c_init": "normal",
               "phm_init_range": 0.0001, "learn_phm": True, "hypercomplex_nonlinearity": "glorot-uniform",
               "stochastic_depth": 0.0}


@dataclass
class Piece:
    """One config of a union; its tensors, by path from the base model with `{}` for the adapter's name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    places: set[tuple[int, str]] = field(default_factory=set)  # of bottlenecks

    @property
    def kind(self) -> Any:
        return self.config.get("architecture")


def _of(slot: Slot, name: str) -> Tensor:
    value = slot._parameters[name]
    assert value is not None
    return value.detach()


def _order(hub: Hub, method: Adapter, site: Site) -> tuple[Order, str] | None:
    """(order, place) of an adapter at a site, or None where the library has none."""
    behind = site.role.startswith("norm.") and site.block is not None and hub.post_norm()
    stream = isinstance(method, StreamAdapter | StreamCompacter)
    if behind and method.form == "sequential":
        place = {"norm.attn": "attn", "norm.cross": "cross.attn", "norm.mlp": "mlp"}.get(site.role)
        order: Order = "stream" if stream or isinstance(method, Pfeiffer) else "norm"
        return (order, place) if place and not (order == "stream" and place != "mlp" and not stream) else None
    if site.role not in ("attn", "mlp"):
        return None
    place = f"cross.{site.role}" if site.cross else site.role
    if method.form == "parallel":
        return ("parallel", place) if stream or hub.post_norm() else None
    return "stream" if stream else "sub", place


def export_bottleneck(hub: Hub, method: Adapter, slots: Sequence[Slot]) -> list[Piece]:
    """A config for each order; one more for each sub-layer that is on layers of its own."""
    orders: dict[Order, dict[str, dict[int, Slot]]] = {}
    for slot in slots:
        found = _order(hub, method, slot.site)
        if found is None or (hub.layer(slot.site), found[1]) not in hub.places:
            reads = "the sub-layer's input behind its norm" if method.form == "parallel" else "that site"
            raise DeltaError(f"AdapterHub has no {type(method).__name__} at {slot.site.name} of "
                             f"{hub.anatomy.model_type}: none of its adapters reads {reads}.", KEEP)
        orders.setdefault(found[0], {}).setdefault(found[1], {})[hub.layer(slot.site)] = slot
    pieces = []
    for order, places in orders.items():
        layers = {i for at in places.values() for i in at}
        whole = all(set(at) == {i for i, p in hub.places if p == place and i in layers} for place, at in places.items())
        for group in [places] if whole else [{place: at} for place, at in places.items()]:
            pieces.append(_bottleneck(hub, method, order, group))
    return pieces


def _bottleneck(hub: Hub, method: Adapter, order: Order, places: Mapping[str, Mapping[int, Slot]]) -> Piece:
    layers = {i for at in places.values() for i in at}
    before, after, residual = FLAGS[order]
    phm: dict[str, Any] = {}
    if isinstance(method, PHM):
        phm = {"phm_layer": True, "phm_dim": method.division, "phm_rank": method.rank or 1,
               "factorized_phm_W": method.rank is not None, "shared_phm_rule": method.shared_rule}
    part = Bottleneck(
        **{key: place in places for place, key in PLACES.items()},
        reduction_factor=_factor(hub.width, method.bottleneck),
        non_linearity=_theirs(method.activation), original_ln_before=before, original_ln_after=after,
        residual_before_ln=residual, ln_before=method.layer_norm == "in", ln_after=method.layer_norm == "out",
        is_parallel=order == "parallel", scaling="learned" if method.learned_scale else float(method.scale),
        dropout=method.dropout, leave_out=[i for i in range(len(hub.layers)) if i not in layers], **phm)
    tensors: dict[str, Tensor] = {}
    for place, at in places.items():
        for i, slot in at.items():
            tensors |= {f"{hub.holder(i, place)}.adapters.{{}}.{n}": t for n, t in _parameters(method, slot)}
    if isinstance(method, PHM) and method.shared_rule:
        rule = next(iter(next(iter(places.values())).values()))._shared[0]._parameters["A"]
        assert rule is not None
        tensors["shared_parameters.{}.phm_rule"] = rule.detach()
    return Piece({**_BOTTLENECK, **part.model_dump()}, tensors,
                 {(i, PLACES[p]) for p, at in places.items() for i in at})


def _parameters(method: Adapter, slot: Slot) -> Iterable[tuple[str, Tensor]]:
    """The library's parameters of one bottleneck."""
    down = f"adapter_down.{1 if method.layer_norm == 'in' else 0}"
    if method.layer_norm != "none":
        for norm in ("adapter_norm_before", "adapter_down.0") if method.layer_norm == "in" else ("adapter_norm_after",):
            yield f"{norm}.weight", _of(slot, "ln")
            yield f"{norm}.bias", _of(slot, "ln_bias")
    if method.learned_scale:
        yield "scaling", (_of(slot, "gain") * method.scale).reshape(1)
    for name, at in (("down", down), ("up", "adapter_up")):
        if not isinstance(method, PHM):
            yield f"{at}.weight", _of(slot, name)
            yield f"{at}.bias", _of(slot, f"{name}_bias")
            continue
        factors = {"B": "W"} if method.rank is None else {"s": "W_left", "t": "W_right"}
        for ours, theirs in {**factors, "bias": "b", **({} if method.shared_rule else {"A": "phm_rule"})}.items():
            yield f"{at}.{theirs}", _of(slot, f"{name}_{ours}")


def _factor(hidden: int, width: int) -> float:
    """The reduction that gives the library this width: it rounds down.

    Example:
        >>> _factor(768, 48), all(int(768 // _factor(768, m)) == m for m in range(1, 2000))
        (16.0, True)
    """
    factor = hidden / width
    while int(hidden // factor) < width:
        factor -= factor * 2**-50
    return factor


def _theirs(activation: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def export_linear(hub: Hub, method: LoRA | IA3, slots: Sequence[Slot]) -> list[Piece]:
    """One config: the same roles in every layer that is not left out, cross-attention included."""
    name, held = type(method).__name__, {slot.site.name: slot for slot in slots}
    if odd := [s.site for s in slots if s.site.role not in LINEARS or s.site.at == "input"]:
        raise DeltaError(f"AdapterHub has no {name} at {odd[0].name}.", f"It has: {listing(LINEARS)}.",
                         "It scales before the activation: IA3(sites=('attn.k', 'attn.v', 'mlp.up'))."
                         if odd[0].role == "mlp.act" else "", KEEP)
    layers = {hub.layer(s.site) for s in slots}
    roles = [LINEARS[role] for role in LINEARS if any(s.site.role == role for s in slots)]
    letters = [key for key in roles if len(key) == 1]
    scale: dict[str, Any] = {"r": 1, "alpha": 1, "composition_mode": "scale"}
    if isinstance(method, LoRA):
        alpha = method.scale * method.rank if method.rslora else method.alpha
        scale = {"r": method.rank, "alpha": int(alpha) if alpha == int(alpha) else alpha, "dropout": method.dropout}
    part = Lora(selfattn_lora=bool(letters), attn_matrices=letters, intermediate_lora="intermediate_lora" in roles,
                output_lora="output_lora" in roles,
                leave_out=[i for i in range(len(hub.layers)) if i not in layers], **scale)
    tensors: dict[str, Tensor] = {}
    for path, slices in hub.linears.items():
        sites = [s for s in slices if hub.layer(s) in layers and chosen(part, s.role)]
        if missing := [s.name for s in sites if s.name not in held]:
            raise DeltaError(f"AdapterHub's {name} goes on a role in all attentions of a layer, and this one leaves "
                             f"out: {listing(missing, 6)}.", KEEP)
        names = ("l",) if isinstance(method, IA3) else ("A", "B")
        values = [torch.cat([_of(held[s.name], n) for s in sites]) for n in names] if sites else []
        tensors |= {f"{path}.loras.{{}}.lora_{'B' if n == 'l' else n}": t[:, None] if n == "l" else t
                    for n, t in zip(names, values, strict=False)}
    config = {**_START, "architecture": "lora", "init_weights": "lora" if isinstance(method, LoRA) else "ia3",
              "dtype": None, **part.model_dump()}
    return [Piece(config, tensors)]


def export_prefix(hub: Hub, method: PrefixTuning, slots: Sequence[Slot]) -> list[Piece]:
    """A flat prefix, whatever network it was trained with."""
    check_relative(hub, "PrefixTuning")
    if method.positions != "apart" or method.composition != "concat":
        raise DeltaError("AdapterHub's prefix stands before the keys and takes no position of the text; this one has "
                         f"positions='{method.positions}', composition='{method.composition}'.", KEEP)
    final = method.final(list(slots))
    held = {s.site.name: final[1] if final else {f"{s.label}.{n}": _of(s, n) for n in ("key", "value")} for s in slots}
    labels = {s.site.name: s.label for s in slots}
    layers = {hub.layer(s.site) for s in slots}
    groups = {loc: [s for s in sites if s.name in held] for loc, sites in hub.prefixes.items()}
    part = Prefix.model_validate({
        "flat": True, "prefix_length": method.length, "encoder_prefix": bool(groups.get("encoder_prefix")),
        "cross_prefix": bool(groups.get("cross_prefix")),
        "leave_out": [i for i in range(len(hub.layers)) if i not in layers]})
    tensors: dict[str, Tensor] = {}
    for location, sites in hub.prefixes.items():
        expected = [s for s in sites if hub.layer(s) in layers] if wanted(part, location) else []
        if missing := [s.name for s in expected if s.name not in held]:
            raise DeltaError(f"AdapterHub's prefix goes on all attentions of a kind, and this one leaves out: "
                             f"{listing(missing, 6)}.", KEEP)
        pairs = [held[s.name][f"{labels[s.name]}.{n}"] for s in expected for n in ("key", "value")]
        if pairs:
            tensors[f"prefix_tuning.prefix_tunings.{{}}.{location}.control_trans"] = torch.cat(pairs, -1).flatten()
    config = {**_START, "architecture": "prefix_tuning", "shared_gating": True, **part.model_dump()}
    return [Piece(config, tensors)]


def export(hub: Hub, method: Method, slots: Sequence[Slot]) -> list[Piece]:
    """The parts of one method. Errors: DeltaError for a method, or a site, that AdapterHub has nothing for."""
    if type(method) not in METHODS:
        raise DeltaError(f"AdapterHub has no counterpart of {type(method).__name__}.",
                         f"It can take: {listing(key_of(cls) for cls in METHODS)}.", KEEP)
    if isinstance(method, LoRA | IA3):
        return export_linear(hub, method, slots)
    if isinstance(method, PrefixTuning):
        return export_prefix(hub, method, slots)
    assert isinstance(method, Adapter)
    return export_bottleneck(hub, method, slots)
