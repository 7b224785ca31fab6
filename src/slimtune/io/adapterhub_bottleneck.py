"""AdapterHub's bottlenecks, Compacter among them, as our adapters.

With h the sub-layer's output, r the residual and a the residual around the bottleneck f, the library computes

    original_ln_before:  u = LN(h + r), or h + r in a pre-norm block;    else u = h
    residual_before_ln:  a = h, or h + r when it is "post_add";          else a = u
    out = f(u) + a;      original_ln_after: LN(out + r), or out + r in a pre-norm block

and for a parallel one u = r and out = f(r) + h. Those combinations that hold the residual once are ours; the others
are refused. Dropout stands inside the bottleneck here, and behind it there; a trained scale of every channel is
multiplied into the up-projection; factors that all sites share are copied to each.
"""
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from slimtune.core.sites import Site
from slimtune.errors import DeltaError
from slimtune.io.adapterhub_config import ACTIVATIONS, Bottleneck, refuse
from slimtune.io.adapterhub_names import PLACES, Hub
from slimtune.io.adapterhub_parts import SHARED, Ledger, Read, read_as
from slimtune.io.adapterhub_stream import norm_role
from slimtune.io.delta_folder import NOTHING
from slimtune.io.peft_names import site_patterns

Order: TypeAlias = Literal["sub", "stream", "norm", "parallel"]
"""Behind the sub-layer; on the residual stream; behind its norm (post-norm); beside it."""


def order_of(part: Bottleneck, post_norm: bool, where: str) -> Order:
    """Which of the four a config is. Errors: DeltaError for the others, with the flags."""
    flags = {k: getattr(part, k) for k in ("original_ln_before", "original_ln_after", "residual_before_ln")}
    before, after, residual = flags.values()
    if part.ln_after and part.adapter_residual_before_ln and not part.is_parallel:
        raise refuse(where, "adapter_residual_before_ln", True, "Its layer norm takes the residual as well.")
    if part.ln_before and part.ln_after:
        raise refuse(where, "ln_after", True, "With ln_before it is a second layer norm of one adapter.")
    if part.is_parallel:
        if after:
            return "parallel"
    elif not before:
        if after and residual != "post_add":
            return "sub"
    elif residual is True and after:
        return "stream"
    elif residual is False and not after:
        return "norm" if post_norm else "stream"
    said = ", ".join(f"{k}={v}" for k, v in {**flags, "is_parallel": part.is_parallel}.items())
    raise DeltaError(f"{where}: slimtune does not support these flags together: {said}.",
                     f"On this {'post' if post_norm else 'pre'}-norm model they lose the residual, or add it twice.",
                     NOTHING)


def width_of(part: Bottleneck, layer: int, hidden: int, where: str) -> int:
    """The bottleneck's width at a layer, by its reduction."""
    factor = part.reduction_factor
    if isinstance(factor, dict):
        if str(layer) not in factor and "default" not in factor:
            raise refuse(where, "reduction_factor", factor, f"It says nothing of layer {layer}, and has no default.")
        factor = factor.get(str(layer), factor.get("default", 0.0))
    if not factor > 0:
        raise refuse(where, "reduction_factor", factor, "It must be above 0.")
    return max(1, int(hidden // factor))


def read_bottleneck(hub: Hub, ledger: Ledger, part: Bottleneck) -> list[Read]:
    """One method for each width."""
    where = ledger.where
    if (name := part.non_linearity.lower()) not in ACTIVATIONS:
        raise refuse(where, "non_linearity", name, f"It knows: {' '.join(ACTIVATIONS)}.")
    if part.phm_layer and part.scaling == "channel":
        raise refuse(where, "scaling", "channel", "With phm_layer there is no matrix to multiply it into.")
    order = order_of(part, hub.post_norm(), where)
    layers = part.layers(len(hub.layers))
    chosen = [(i, place) for i, place in hub.places if i in layers and getattr(part, PLACES[place])]
    if not chosen:
        raise DeltaError(f"{where}: the bottleneck goes on no layer.",
                         "mh_adapter, output_adapter and leave_out say where.", NOTHING)
    groups: dict[int, list[tuple[int, str]]] = {}
    for i, place in chosen:
        groups.setdefault(width_of(part, i, hub.width, where), []).append((i, place))
    reads = []
    for width, members in groups.items():
        read = read_as(_method(hub, part, order, width, members))
        for i, place in members:
            site = _host(hub, order, hub.places[i, place])
            at = f"{hub.holder(i, place)}.adapters"
            read.values |= {(site.name, n): t for n, t in _values(ledger, part, at, hub.width, width)}
        if part.phm_layer and part.shared_phm_rule:
            read.values[SHARED, "A"] = _rule(ledger, part, "shared_parameters")
        reads.append(read)
    return reads


def _host(hub: Hub, order: Order, site: Site) -> Site:
    """The site that a method's values are named after."""
    if order == "norm" or (order == "stream" and hub.post_norm()):
        return next(s for s in hub.anatomy.sites
                    if (s.tower, s.block, s.role) == (site.tower, site.block, norm_role(site)))
    return site


def _method(hub: Hub, part: Bottleneck, order: Order, width: int, members: list[tuple[int, str]]) -> dict[str, Any]:
    """The config of our method."""
    places, post = {place for _, place in members}, hub.post_norm()
    sites = [hub.places[m] for m in members]
    if order == "norm":
        sites = [_host(hub, order, s) for s in sites]
    learned = part.scaling == "learned"
    scale = 1.0 if isinstance(part.scaling, str) else part.scaling
    full = part.phm_layer and not part.factorized_phm_W
    if order == "stream" or (order == "parallel" and not post):
        plain = post and order == "stream" and places == {"mlp"}
        name = "stream_compacter" if part.phm_layer else "pfeiffer" if plain else "stream_adapter"
    elif part.phm_layer:
        name = ("phm_adapter" if full and not part.shared_phm_rule else
                "compacter_plus_plus" if places == {"mlp"} else "compacter")
    elif order == "parallel":
        name = "scaled_parallel_adapter" if learned or scale != 1.0 else "parallel_adapter"
    else:
        name = "houlsby" if order == "sub" and places == {"attn", "mlp"} else "bottleneck_adapter"
    phm = {"division": part.phm_dim, "rank": None if full else part.phm_rank, "shared_rule": part.shared_phm_rule}
    return {"name": name, "bottleneck": width, "activation": ACTIVATIONS[part.non_linearity.lower()],
            "dropout": part.dropout, "form": "parallel" if order == "parallel" else "sequential",
            "scale": scale, "learned_scale": learned, "sites": site_patterns(hub.anatomy, sites),
            "layer_norm": "in" if part.ln_before else "out" if part.ln_after else "none",
            **(phm if part.phm_layer else {})}


def _values(ledger: Ledger, part: Bottleneck, at: str, hidden: int, width: int) -> Iterator[tuple[str, Tensor]]:
    """Our parameters of one bottleneck, by name."""
    down = f"{at}.adapter_down.{1 if part.ln_before else 0}"
    if part.ln_before or part.ln_after:
        norm = f"{at}.adapter_down.0" if part.ln_before else f"{at}.adapter_norm_after"
        for ours, theirs in (("ln", "weight"), ("ln_bias", "bias")):
            value = ledger.take(f"{norm}.{theirs}", (hidden,))
            if part.ln_before:
                ledger.same(f"{at}.adapter_norm_before.{theirs}", value)
            yield ours, value
    if part.scaling == "learned":
        yield "gain", ledger.take(f"{at}.scaling", (1,)).reshape(())
    if part.phm_layer:
        yield from _kronecker(ledger, part, "down", down, hidden, width)
        yield from _kronecker(ledger, part, "up", f"{at}.adapter_up", width, hidden)
        return
    yield "down", ledger.take(f"{down}.weight", (width, hidden))
    yield "down_bias", ledger.take(f"{down}.bias", (width,))
    up = ledger.take(f"{at}.adapter_up.weight", (hidden, width))
    up_bias = ledger.take(f"{at}.adapter_up.bias", (hidden,))
    if part.scaling == "channel":
        channel = ledger.take(f"{at}.scaling", (hidden,))
        up, up_bias = channel[:, None] * up, channel * up_bias
    yield "up", up
    yield "up_bias", up_bias


def _kronecker(ledger: Ledger, part: Bottleneck, name: str, at: str, d_in: int,
               d_out: int) -> Iterator[tuple[str, Tensor]]:
    """A projection that is a sum of Kronecker products."""
    n, r = part.phm_dim, part.phm_rank
    if d_in % n or d_out % n:
        raise refuse(ledger.where, "phm_dim", n, f"It does not divide {d_in} and {d_out}.")
    path = f"shared_parameters.W_{name}" if part.shared_W_phm else f"{at}.W"
    if part.factorized_phm_W:
        yield f"{name}_s", ledger.take(f"{path}_left", (n, d_in // n, r))
        yield f"{name}_t", ledger.take(f"{path}_right", (n, r, d_out // n))
    else:
        yield f"{name}_B", ledger.take(path, (n, d_in // n, d_out // n))
    if not part.shared_phm_rule:
        yield f"{name}_A", _rule(ledger, part, at)
    yield f"{name}_bias", ledger.take(f"{at}.b", (d_out,)) if part.phm_bias else torch.zeros(d_out)


def _rule(ledger: Ledger, part: Bottleneck, at: str) -> Tensor:
    """A: (n, n, n)."""
    n = part.phm_dim
    if at == "shared_parameters" and not any(path.startswith(at) for path in ledger.values):
        raise DeltaError(f"{ledger.where}: there is no tensor for shared_parameters.phm_rule.",
                         "adapters 1.3.0 leaves it out when it saves a model whose names have no prefix, as T5 or "
                         "BertModel, so the file is not whole. Train with shared_phm_rule=False, or save a class "
                         "with a head.", NOTHING)
    if part.factorized_phm_rule:
        return ledger.take(f"{at}.phm_rule_left", (n, n, 1)) @ ledger.take(f"{at}.phm_rule_right", (n, 1, n))
    return ledger.take(f"{at}.phm_rule", (n, n, n))
