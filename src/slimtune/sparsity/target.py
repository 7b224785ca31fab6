"""Targets: the weights that may be pruned, by name of state.

A sparsity is a share of its targets, and which these are is the denominator that is stored with it:

    delta      the trained matrices of what is added (LoRA's A and B, an adapter's down and up), no bias, norm or prefix
    base       the backbone's linear maps at the chosen sites: E of the papers, 84,934,656 on BERT-base
    base+pooler    with the pooler's: 85,524,480
    gates      the coefficients of a Gates delta: heads and neurons
    hidden     those of a Gates(hidden=True) delta that gate the dimensions of the residual stream
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from slimtune.core import Delta, Site, Slot
from slimtune.core.mask import base_places
from slimtune.core.method import key_of
from slimtune.core.sites import LINEAR, join, lookup
from slimtune.errors import MethodError, SiteError

On: TypeAlias = Literal["delta", "base", "both", "gates", "hidden"]
SLICED = ("gates", "hidden")
"""What `shrink` slices out for real."""


@dataclass(frozen=True)
class Target:
    """One tensor that may be pruned.

    parameter: as it stands in the model, masked if it is. sites: where it acts, several for a fused projection.
    transposed: it is (in, out), as in Conv1D, and not (out, in). module: the path of a backbone's linear map.
    """

    name: str
    parameter: nn.Parameter
    sites: tuple[Site, ...] = ()
    transposed: bool = False
    module: str | None = None


def oriented(tensor: Tensor, target: Target) -> Tensor:
    """As (d_out, d_in), or back to the way the target is stored: a view. Conv1D stores a weight as (d_in, d_out)."""
    return tensor.mT if target.transposed else tensor


def targets(delta: Delta, on: On = "delta", sites: Sequence[str] = ("linear",), blocks: Sequence[int] | None = None,
            pooler: bool = False) -> dict[str, Target]:
    """The weights of the delta, of the backbone below it, or of both, that may be pruned, in the model's order.

    sites, blocks, pooler: which of the backbone's linear maps. Errors: SiteError for a site that is no linear map;
    MethodError where there is nothing to prune.
    """
    found: dict[str, Target] = {}
    if on in ("delta", "both"):
        found |= _of_delta(delta)
    if on in ("base", "both"):
        found |= _of_base(delta, sites, blocks, pooler)
    if on in SLICED:
        found = _gates(delta) if on == "gates" else hidden_gates(delta)
    if not found:
        raise MethodError(f"delta '{delta.name}' has nothing to prune: on='{on}' finds no weights.",
                          "Attach Gates() first." if on == "gates" else
                          "Attach Gates(hidden=True) first." if on == "hidden" else
                          "Of what is added, matrices at a site count, and no bias, norm, prefix or side network. "
                          "Prune the backbone with on='base'.")
    return found


def denominator(on: On, pooler: bool = False) -> str:
    """What a sparsity is a share of, as files and reports say it."""
    base = "base+pooler" if pooler else "base"
    return {"delta": "delta", "base": base, "both": f"delta+{base}", "gates": "gates",
            "hidden": "hidden"}[on]


def _of_delta(delta: Delta) -> dict[str, Target]:
    found = {}
    for _, slot in delta.slots:
        if slot.kind in ("output", "input") and not _is_gate(slot):
            found |= {f"{slot.label}.{n}": Target(f"{slot.label}.{n}", p, (slot.site,))
                      for n, p in slot._parameters.items() if p is not None and p.requires_grad and p.dim() > 1}
    for key, module in delta.shared.items():
        found |= {f"shared.{key}.{n}": Target(f"shared.{key}.{n}", p) for n, p in module._parameters.items()
                  if p is not None and p.requires_grad and p.dim() > 1}
    return found


def _of_base(delta: Delta, sites: Sequence[str], blocks: Sequence[int] | None, pooler: bool) -> dict[str, Target]:
    at: dict[str, list[Site]] = {}
    for site in delta.anatomy.select(sites, blocks, who="pruning"):
        if site.role not in LINEAR:
            raise SiteError(f"pruning asked for site '{site.role}', which is no linear map.",
                            f"Linear maps are: {', '.join(LINEAR)}.")
        at.setdefault(site.path, []).append(site)
    base, own = base_places(delta), delta.tensors()
    found = {}
    for path, here in at.items():
        name = f"own.{path}.weight"
        if name in base:  # a tied weight has one name
            found[name] = Target(name, own.get(name, _standing(delta, path)), tuple(here), here[0].transposed, path)
    if pooler:
        path = join(delta.anatomy.base, "pooler", "dense")
        if lookup(delta.model, path) is None:
            raise SiteError(f"this {delta.anatomy.model_type} has no pooler to prune.", "Leave pooler out.")
        name = f"own.{path}.weight"
        found[name] = Target(name, own.get(name, _standing(delta, path)), module=path)
    return found


def _standing(delta: Delta, path: str) -> nn.Parameter:
    return delta.model.get_submodule(path)._parameters["weight"]  # type: ignore[return-value]


def _gates(delta: Delta) -> dict[str, Target]:
    return {f"{slot.label}.{n}": Target(f"{slot.label}.{n}", p, (slot.site,))
            for _, slot in delta.slots if _is_gate(slot) for n, p in slot._parameters.items() if p is not None}


def hidden_gates(delta: Delta) -> dict[str, Target]:
    """The coefficients of the residual stream's dimensions: one tensor, at all norms."""
    slots = [slot for _, slot in delta.slots if is_hidden_gate(slot)]
    names = dict.fromkeys(f"shared.{slot.label.rpartition('.')[2]}.hidden" for slot in slots)
    tensors, sites = delta.tensors(), tuple(slot.site for slot in slots)
    return {name: Target(name, tensors[name], sites) for name in names}


def check_norms(deltas: Iterable[Delta]) -> None:
    """Errors: MethodError where something beside one set of gates of the stream acts at its norms: what comes first is
    lost, for the gates take the norm anew, and what comes behind lets values in at dimensions that are gone."""
    acting = {(delta.name, slot.label.rpartition(".")[2]): slot for delta in deltas for _, slot in delta.slots
              if slot.site.role.startswith("norm.")}
    gates = [at for at, slot in acting.items() if is_hidden_gate(slot)]
    if odd := [at for at in acting if at not in gates[:1]]:
        raise MethodError(f"hidden dimensions are gated at the norms, where {type(acting[odd[0]].method).__name__} of "
                          f"delta '{odd[0][0]}' acts as well ({acting[odd[0]].site.name}).",
                          "Leave the norms out of its sites, or fold it in by shrink() before the gates are attached.")


def is_hidden_gate(slot: Slot) -> bool:
    """Whether a slot gates the stream at a norm."""
    return _is_gate(slot) and slot.site.role.startswith("norm.")


def _is_gate(slot: Slot) -> bool:
    return key_of(type(slot.method)) == "gates"
