"""Structure: the weights that a head, a neuron or a hidden dimension takes with it when it goes.

    head g        rows g of q, k and v, columns g of the output projection
    neuron j      rows j of up and gate, column j of down
    dimension i   columns i of q, k, v, up and gate, rows i of the output and down projections, in all blocks

so that scores of weights become scores of gates: the sum over what would go.
"""
from collections.abc import Mapping

import torch
from torch import Tensor

from slimtune.core import Delta, Site
from slimtune.core.method import key_of
from slimtune.core.sites import LINEAR
from slimtune.sparsity.target import Target

OUT = ("attn.o", "mlp.down")
PARTS = {"attn.heads": ("attn.q", "attn.k", "attn.v", "attn.o"), "mlp.act": ("mlp.up", "mlp.gate", "mlp.down")}


def tied(delta: Delta, gate: Target) -> list[Site]:
    """The linear sites that a gate's units have slices in."""
    at = gate.sites[0]
    if at.role not in PARTS:  # a norm's: the whole stream
        return [s for s in delta.anatomy.sites if s.tower == at.tower and s.role in LINEAR]
    return [s for s in delta.anatomy.sites if (s.tower, s.block, s.cross) == (at.tower, at.block, at.cross)
            and s.role in PARTS[at.role]]


def silenced(delta: Delta) -> dict[str, str]:
    """Names of the backbone's tensors that no gradient reaches, because every gate behind them is pruned; and why."""
    found = {}
    for _, slot in delta.slots:
        if key_of(type(slot.method)) == "gates":
            mask = delta.masks.get(f"{slot.label}.c")
            if mask is not None and not bool(mask.any()):
                gate = Target(slot.label, next(iter(slot.parameters())), (slot.site,))
                found |= {f"own.{site.path}.{part}": f"all of {slot.site.name} is pruned"
                          for site in [*tied(delta, gate), *_norm_before(delta, slot.site)]
                          for part in ("weight", "bias") if part == "weight" or site.role not in OUT}
    return found


def _norm_before(delta: Delta, site: Site) -> list[Site]:
    """The norm that only the sub-layer of a gate reads; behind post-norms others read it as well."""
    role = "norm.mlp" if site.role == "mlp.act" else "norm.cross" if site.cross else "norm.attn"
    return [] if delta.anatomy.tower(site.tower).post_norm else [
        s for s in delta.anatomy.sites if (s.tower, s.block, s.role) == (site.tower, site.block, role)]


def at_site(weight: Tensor, site: Site) -> Tensor:
    """A site's rows of what is stored as its map's weight, (d_out, d_in): a view."""
    weight = weight.mT if site.transposed else weight
    return weight if site.part is None else weight[slice(*site.part)]


def of_units(site: Site, values: Tensor, units: int, hidden: bool = False) -> Tensor:
    """A site's values (d_out, d_in), summed over what belongs to each of the units. Shapes: result (units,).

    hidden: the units are dimensions of the stream, which maps into the sub-layer read and those out of it write.
    """
    if (site.role in OUT) != hidden:
        values = values.mT
    return values.reshape(units, -1).sum(1)


def gate_scores(delta: Delta, gates: Mapping[str, Target], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The score of each gate, as the sum over the weights that go with it, from scores of the backbone's weights."""
    found = {}
    for name, gate in gates.items():
        total = torch.zeros(gate.parameter.shape, dtype=torch.float64, device=gate.parameter.device)
        for site in tied(delta, gate):
            own = scores.get(f"own.{site.path}.weight")
            if own is not None:
                hidden = gate.sites[0].role not in PARTS
                total += of_units(site, at_site(own, site).double(), total.numel(), hidden).reshape(total.shape)
        found[name] = total.float()
    return found


def costs(delta: Delta, gates: Mapping[str, Target], unit: str, tokens: int) -> dict[str, float]:
    """What one unit of each gate costs: multiply-adds of `tokens` tokens ("macs"), or numbers ("params").

    A head takes 4 T H d + 2 T^2 d, a neuron of a plain network 2 T H.
    """
    found = {}
    for name, gate in gates.items():
        units = gate.parameter.numel()
        sites = tied(delta, gate)
        weights = sum(s.d_in * s.d_out for s in sites) / units
        if unit == "params":
            biases = sum(s.d_out for s in sites if s.role not in OUT and _has_bias(delta, s))
            found[name] = weights + biases / units
        else:
            core = 2 * tokens**2 * gate.sites[0].d_in / units if gate.sites[0].role == "attn.heads" else 0.0
            found[name] = tokens * weights + core
    return found


def _has_bias(delta: Delta, site: Site) -> bool:
    return delta.model.get_submodule(site.path)._parameters.get("bias") is not None
