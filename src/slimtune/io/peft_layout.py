"""Our LoRA, (IA)^3 and norms in PEFT's layout: one adapter a module, whatever slices and methods it is made of."""
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.delta import Delta
from slimtune.core.insert import Slot
from slimtune.core.sites import widths
from slimtune.errors import DeltaError, listing
from slimtune.io.peft_names import LINEARS
from slimtune.methods.lora import LoRA

Layout = tuple[dict[str, Any], dict[str, Tensor]]


def endings(wanted: Sequence[str], universe: Iterable[str]) -> list[str]:
    """The shortest endings of paths that name the wanted ones and no other of the universe, as PEFT matches them.

    Example:
        >>> endings(["0.attn.q", "1.attn.q"], ["0.attn.q", "0.mlp.up", "1.attn.q"]), endings(["0.q"], ["0.q", "1.q"])
        (['q'], ['0.q'])
    """
    named: dict[str, set[str]] = {}
    for path in universe:
        parts = path.split(".")
        for i in range(len(parts)):
            named.setdefault(".".join(parts[i:]), set()).add(path)
    goal, chosen = set(wanted), []
    covered: set[str] = set()
    for path in wanted:
        if path not in covered:
            parts = path.split(".")
            ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
            chosen.append(next(end for end in ends if named[end] <= goal))
            covered |= named[chosen[-1]]
    return chosen


def lora_layout(delta: Delta, paths: Sequence[str]) -> Layout:
    """One A and B a module. Slices and several LoRAs of one module are stacked: rank n r, B block by block."""
    slots = _by_path(delta)
    dropouts = {m.dropout for m in delta.methods if isinstance(m, LoRA)}
    if len(dropouts) > 1:
        raise DeltaError(f"PEFT has one dropout for all modules; this delta has {sorted(dropouts)}.",
                         "Give its LoRAs the same dropout.")
    rslora = all(m.rslora for m in delta.methods if isinstance(m, LoRA))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, members in slots.items():
        rank, alpha, a, b = _stack(delta.model.get_submodule(path), members, rslora)
        ranks[path], alphas[path] = rank, int(alpha) if alpha == int(alpha) else alpha
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    fields = {"r": r, "lora_alpha": alpha, "lora_dropout": dropouts.pop(), "use_rslora": rslora, "bias": "none",
              "use_dora": False, "target_modules": endings(list(slots), paths), "init_lora_weights": True,
              "rank_pattern": _patterns(ranks, r), "alpha_pattern": _patterns(alphas, alpha),
              "fan_in_fan_out": _fan_in_fan_out(slots)}
    return fields, tensors


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """{ending: value} of the modules that differ from the default."""
    found: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            found |= {re.escape(e): value for e in endings([p for p, v in values.items() if v == value], values)}
    return found


def _stack(module: nn.Module, members: Sequence[Slot], rslora: bool) -> tuple[int, float, Tensor, Tensor]:
    """(rank, alpha, A, B) that do what all slots of a module do together."""
    first, method = members[0], members[0].method
    a, b = _of(first, "A"), _of(first, "B")
    if len(members) == 1 and first.site.part is None:
        return method.rank, method.alpha if method.rslora == rslora else method.scale * method.rank, a, b
    out = widths(module)[1]
    spans = [slice(*s.site.part) if s.site.part else slice(0, out) for s in members]
    shared = (all(s.method.scale == method.scale and torch.equal(_of(s, "A"), a) for s in members)
              and len({span.start for span in spans}) == len(members))
    rank = method.rank if shared else sum(s.method.rank for s in members)
    whole = torch.zeros(out, rank, dtype=b.dtype, device=b.device)
    column = 0
    for slot, span in zip(members, spans, strict=True):
        value = _of(slot, "B")
        ratio = slot.method.scale / method.scale if method.scale else 1.0
        whole[span, column:column + value.shape[1]] = value if ratio == 1.0 else value * ratio
        column += 0 if shared else value.shape[1]
    alpha = method.scale * (rank**0.5 if rslora else rank)
    return rank, alpha, a if shared else torch.cat([_of(s, "A") for s in members]), whole


def _of(slot: Slot, name: str) -> Tensor:
    value = slot._parameters[name]
    assert value is not None
    return value.detach()


def ia3_layout(delta: Delta, paths: Sequence[str]) -> Layout:
    """One vector a module: at its input where it is feed-forward, else at its output; ones for slices without."""
    slots = _by_path(delta, inputs=True)
    tensors: dict[str, Tensor] = {}
    forward = [path for path, members in slots.items() if members[0].site.at == "input"]
    for path, members in slots.items():
        taken = [s.site.part for s in members]
        if len({s.site.at for s in members}) > 1 or len(set(taken)) < len(taken):
            raise DeltaError(f"PEFT has one vector of IA3 a module, and {path} has {len(members)}: "
                             f"{listing(s.site.name for s in members)}.", "Keep the delta in slimtune's own folder.")
        first = _of(members[0], "l")
        if path in forward:
            tensors[f"{path}.ia3_l"] = first[None]
            continue
        whole = first.new_ones(widths(delta.model.get_submodule(path))[1])
        for slot in members:
            whole[slice(*slot.site.part) if slot.site.part else slice(None)] = _of(slot, "l")
        tensors[f"{path}.ia3_l"] = whole[:, None]
    ends = endings(forward, paths)
    fields = {"target_modules": [*endings([p for p in slots if p not in forward], paths), *ends],
              "feedforward_modules": ends, "fan_in_fan_out": _fan_in_fan_out(slots), "init_ia3_weights": True}
    return fields, tensors


def norm_layout(delta: Delta, norms: Sequence[str], paths: Sequence[str]) -> Layout:
    """The norms that a NormTuning trains; `norms` are their paths."""
    tensors = {f"{path}.ln_tuning_layers.{n}": value
               for path in norms for n, value in whole_module(delta, path).items()}
    return {"target_modules": endings(norms, paths)}, tensors


def whole_module(delta: Delta, path: str) -> dict[str, Tensor]:
    """All parameters of a module as the delta has them: its own where it owns them, else the base's."""
    own = {o.path: o.value for o in delta.owned}
    swapped: dict[int, nn.Parameter] = {id(o.value): o.base for d in delta.root.deltas.values() for o in d.owned}
    parameters = delta.model.get_submodule(path).named_parameters()
    return {n: own.get(f"{path}.{n}", swapped.get(id(p), p)).detach() for n, p in parameters}


def _by_path(delta: Delta, inputs: bool = False) -> dict[str, list[Slot]]:
    """The slots of each module, once PEFT is sure to be able to adapt it."""
    found: dict[str, list[Slot]] = {}
    for path, slot in delta.slots:
        if slot.site.role not in LINEARS and not (inputs and slot.site.at == "input"):
            raise DeltaError(f"{slot.site.name} has no counterpart in PEFT: {path} is not a linear layer whose output "
                             f"a {type(slot.method).__name__} of PEFT could change.",
                             f"PEFT can take: {listing(LINEARS)}{' mlp.act attn.heads' if inputs else ''}.",
                             "Keep the delta in slimtune's own folder.")
        found.setdefault(path, []).append(slot)
    return found


def _fan_in_fan_out(slots: dict[str, list[Slot]]) -> bool:
    return all(members[0].site.transposed for members in slots.values())
