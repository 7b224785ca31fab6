"""AdapterHub's LoRA, (IA)^3 and prefixes as ours: linear layers by name, prefixes by the order of their attentions."""
from torch import Tensor

from slimtune.core.affine import ACTIVATIONS as OURS
from slimtune.core.affine import affine
from slimtune.core.sites import Site
from slimtune.errors import DeltaError
from slimtune.io.adapterhub_config import ACTIVATIONS, Lora, Prefix, refuse
from slimtune.io.adapterhub_names import LINEARS, Hub
from slimtune.io.adapterhub_parts import Ledger, Read, read_as
from slimtune.io.delta_folder import NOTHING
from slimtune.io.peft_names import site_patterns


def chosen(part: Lora, role: str) -> bool:
    """Whether a LoRA goes on a linear role."""
    key = LINEARS[role]
    return part.selfattn_lora and key in part.attn_matrices if len(key) == 1 else getattr(part, key)


def read_lora(hub: Hub, ledger: Ledger, part: Lora) -> list[Read]:
    """One LoRA, or (IA)^3. On a fused projection every slice has its own A and B, one below the other."""
    layers = part.layers(len(hub.layers))
    found: list[tuple[str, list[Site]]] = []
    for path, slices in hub.linears.items():
        if sites := [s for s in slices if hub.layer(s) in layers and chosen(part, s.role)]:
            found.append((path, sites))
    if not found:
        raise DeltaError(f"{ledger.where}: the LoRA goes on no module.", "selfattn_lora, attn_matrices, "
                         "intermediate_lora, output_lora and leave_out say where.", NOTHING)
    patterns = site_patterns(hub.anatomy, [s for _, sites in found for s in sites])
    scale = part.composition_mode == "scale"
    read = read_as({"name": "ia3", "sites": patterns} if scale else
                   {"name": "lora", "rank": part.r, "alpha": part.alpha, "dropout": part.dropout, "sites": patterns})
    for path, sites in found:
        widths, n = [s.d_out for s in sites], len(sites)
        b = ledger.take(f"{path}.loras.lora_B", (sum(widths), part.r)).split(widths)
        if scale:
            read.values |= {(s.name, "l"): t[:, 0] for s, t in zip(sites, b, strict=True)}
            continue
        a = ledger.take(f"{path}.loras.lora_A", (part.r * n, sites[0].d_in)).chunk(n)
        for s, down, up in zip(sites, a, b, strict=True):
            read.values |= {(s.name, "A"): down, (s.name, "B"): up}
    return [read]


def wanted(part: Prefix, location: str) -> bool:
    """Whether a config gives a location prefixes; the decoder's own attention always has them."""
    return getattr(part, location) if location in ("encoder_prefix", "cross_prefix") else True


def check_relative(hub: Hub, where: str) -> None:
    """Errors: DeltaError for T5, where the library's prefix moves every key away from the queries."""
    if hub.layout.relative:
        raise DeltaError(f"{where}: a prefix on {hub.anatomy.model_type}, which slimtune does not take from or to "
                         "AdapterHub.", "There the prefix takes the first positions of the keys, and not of the "
                         "queries, so that all relative biases of the text are those of other distances.", NOTHING)


def read_prefix(hub: Hub, ledger: Ledger, part: Prefix) -> list[Read]:
    """A flat prefix; a network that makes one is run and dropped, as it is after training."""
    check_relative(hub, ledger.where)
    layers = part.layers(len(hub.layers))
    groups = {location: kept for location, sites in hub.prefixes.items()
              if wanted(part, location) and (kept := [s for s in sites if hub.layer(s) in layers])}
    if not groups:
        raise DeltaError(f"{ledger.where}: the prefix goes on no layer.", "leave_out names all of them.", NOTHING)
    sites = [s for group in groups.values() for s in group]
    read = read_as({"name": "prefix_tuning", "length": part.prefix_length, "positions": "apart",
                    "sites": site_patterns(hub.anatomy, sites)})
    for location, group in groups.items():
        width = group[0].heads * group[0].head_dim
        pairs = _matrix(hub, ledger, part, location, 2 * len(group) * width).split(width, -1)
        for number, site in enumerate(group):
            read.values |= {(site.name, "key"): pairs[2 * number], (site.name, "value"): pairs[2 * number + 1]}
    return [read]


def _matrix(hub: Hub, ledger: Ledger, part: Prefix, location: str, width: int) -> Tensor:
    """All keys and values of a location: (l, 2 n d), K_0, V_0, K_1, ..."""
    at, length = f"prefix_tuning.prefix_tunings.{location}", part.prefix_length
    if part.flat:
        return ledger.take(f"{at}.control_trans", (length * width,)).view(length, width)
    if (name := part.non_linearity.lower()) not in ACTIVATIONS:
        raise refuse(ledger.where, "non_linearity", name, f"It knows: {' '.join(ACTIVATIONS)}.")
    inner = part.bottleneck_size
    embedding = ledger.take(f"{at}.wte.weight", (length, hub.width))
    hidden = affine(embedding, ledger.take(f"{at}.control_trans.0.weight", (inner, hub.width)),
                                        ledger.take(f"{at}.control_trans.0.bias", (inner,)))
    return affine(OURS[ACTIVATIONS[name]](hidden),
                                      ledger.take(f"{at}.control_trans.2.weight", (width, inner)),
                                      ledger.take(f"{at}.control_trans.2.bias", (width,)))
