"""What a side network's block is, read from the block of the backbone that it stands beside.

Kind and eps of the norms, and whether they come before or after; biases, gate, activation, number of heads, scale
of the scores and T5's relative positions are the backbone's; every width is its own divided by r. What no role
names is left out, which is ours: rotary positions, disentangled attention, MPNet's table, norms of queries and
keys, layer scale. There the side network reads positions from h.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimtune.core.anatomy import Anatomy, Tower
from slimtune.core.sites import Site
from slimtune.errors import MethodError, SiteError, listing

SUBLAYERS = ("self", "cross", "mlp")
_NAMES = {"norm.attn": "norm_self", "norm.cross": "norm_cross", "norm.mlp": "norm_mlp",
          "mlp.up": "mlp_up", "mlp.gate": "mlp_gate", "mlp.down": "mlp_down"}


@dataclass(frozen=True)
class Norm:
    """One norm: RMSNorm or LayerNorm, with or without bias, and its eps."""

    rms: bool = True
    bias: bool = False
    eps: float = 1e-6


@dataclass(frozen=True)
class Heads:
    """One attention: query heads, key/value heads, their width, and what the scores are multiplied with."""

    heads: int
    keys: int
    width: int
    scale: float


@dataclass(frozen=True)
class Shape:
    """What a side block is: its widths, and the facts of the backbone's block that it repeats.

    outer: the backbone's width; attention: by "self" and "cross"; norms: by name; biases: the linear maps
    that have one; act: the activation's path from the backbone's block; table: (buckets, largest distance)
    of relative positions.
    """

    outer: int
    width: int
    hidden: int
    gated: bool
    post_norm: bool
    causal: bool
    attention: dict[str, Heads]
    norms: dict[str, Norm]
    biases: frozenset[str]
    act: str
    table: tuple[int, int] | None


@dataclass(frozen=True)
class SideSite(Site):
    """A site of a side network, which knows the shape of the block there."""

    shape: Shape = field(default=None, compare=False)  # type: ignore[assignment]


def block_sites(anatomy: Anatomy, tower: str, block: int) -> dict[str, Site]:
    """The backbone's sites by the names of a side block's tensors: self_q, cross_o, mlp_up, norm_self, ..."""
    found: dict[str, Site] = {}
    for site in anatomy.sites:
        if site.tower == tower and site.block == block:
            if site.role in _NAMES:
                found[_NAMES[site.role]] = site
            elif site.role in ("attn.q", "attn.k", "attn.v", "attn.o", "attn.heads"):
                found[f"{'cross' if site.cross else 'self'}_{site.role.removeprefix('attn.')}"] = site
    return found


def read_shapes(anatomy: Anatomy, module: Callable[[str], nn.Module], r: int) -> dict[tuple[str, int], Shape]:
    """The shape of the side block of every block of the backbone, by tower and number."""
    return {(tower.name, block): read_shape(anatomy, module, tower, block, r)
            for tower in anatomy.towers for block in range(len(tower.blocks))}


def read_shape(anatomy: Anatomy, module: Callable[[str], nn.Module], tower: Tower, block: int, r: int) -> Shape:
    """The shape of the side block of one backbone block.

    Errors: MethodError for a block without a known feed-forward network, or r above the width.
    """
    sites = block_sites(anatomy, tower.name, block)
    if "mlp_up" not in sites or "mlp_down" not in sites:
        raise MethodError(f"a side network cannot go on this {anatomy.model_type}: block {block} of its {tower.name} "
                          "has no feed-forward network that is known.",
                          "Pass anatomy=slimtune.dissect(model, towers=[TowerSpec(...)]) to say where it is.")
    if r > tower.width:
        raise MethodError(f"reduction={r} is more than the width {tower.width} of the {tower.name}.",
                          "Choose a smaller one.")
    final = [s for s in anatomy.sites if s.tower == tower.name and s.role == "norm.final"]
    norms = {name: _norm(module(site.path)) for name, site in sites.items() if name.startswith("norm_")}
    usual = next(reversed(norms.values()), Norm())
    kinds = [kind for kind in SUBLAYERS if kind == "mlp" or f"{kind}_q" in sites]
    top = _norm(module(final[0].path)) if final else usual
    return Shape(
        tower.width, tower.width // r, max(1, sites["mlp_down"].d_in // r), "mlp_gate" in sites, tower.post_norm,
        tower.causal, {k: _heads(module, sites, k, r) for k in kinds if k != "mlp"},
        {f"norm_{k}": norms.get(f"norm_{k}", usual) for k in kinds} | {"norm_top": top},
        frozenset(n for n, s in sites.items() if getattr(module(s.path), "bias", None) is not None),
        _activation(module(tower.blocks[block])), _table(anatomy, module, tower))


def _norm(module: nn.Module) -> Norm:
    bias = getattr(module, "bias", None) is not None
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6
    return Norm(not bias and not isinstance(module, nn.LayerNorm), bias, float(eps))


def _heads(module: Callable[[str], nn.Module], sites: dict[str, Site], kind: str, r: int) -> Heads:
    """T5 leaves its scores as they are; other families divide them by the root of the heads' width, or more."""
    attention, wide = module(str(sites[f"{kind}_heads"].attention)), sites[f"{kind}_heads"].head_dim
    thin = max(1, wide // r)
    given = getattr(attention, "scaling", None)
    given = given if isinstance(given, float) else wide**-0.5
    scale = given if given == 1.0 else given * (wide / thin) ** 0.5
    return Heads(sites[f"{kind}_q"].d_out // wide, sites[f"{kind}_k"].d_out // wide, thin, scale)


def _activation(block: nn.Module) -> str:
    """The path of a block's activation; "" where it is no module of its own, and GELU is taken."""
    for path, module in block.named_modules():
        if type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation") and not list(
                module.parameters()):
            return path
    return ""


def relative_table(anatomy: Anatomy, module: Callable[[str], nn.Module], tower: Tower) -> nn.Embedding | None:
    """The embedding of relative positions that the tower's first attention owns, as in T5."""
    site = block_sites(anatomy, tower.name, 0)["self_heads"]
    table = getattr(module(str(site.attention)), "relative_attention_bias", None)
    return table if isinstance(table, nn.Embedding) else None


def _table(anatomy: Anatomy, module: Callable[[str], nn.Module], tower: Tower) -> tuple[int, int] | None:
    table = relative_table(anatomy, module, tower)
    if table is None:
        return None
    first: Any = module(str(block_sites(anatomy, tower.name, 0)["self_heads"].attention))
    return table.num_embeddings, int(getattr(first, "relative_attention_max_distance", 128))


def kept_blocks(blocks: tuple[int, ...] | None, tower: Tower, who: str) -> list[int]:
    """The blocks that `blocks` keeps of one tower, ascending; all by default.

    Errors: SiteError when it is a block that the tower does not have, or none.
    """
    depth = len(tower.blocks)
    if blocks is None:
        return list(range(depth))
    if not blocks or any(not -depth <= b < depth for b in blocks):
        raise SiteError(f"{who}.blocks: {listing(map(str, blocks)) or 'none'} is not in the {tower.name}.",
                        f"It has: {tower.name} 0 to {depth - 1}, or -{depth} to -1 from its end.")
    return sorted({b % depth for b in blocks})
