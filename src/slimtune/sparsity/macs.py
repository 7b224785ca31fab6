"""MACs: multiplications of a forward, from shapes alone, so that the meta device will do.

    a linear map d_in -> d_out on T tokens:  T d_in d_out        attention on T tokens:  2 T^2 d_h for each head

Norms, activations, embeddings, poolers and heads of tasks are not counted; FLOPs are twice as many. What zeros in a
mask could save is not either: these are the MACs that a dense kernel executes.

Source: Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 3.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from slimtune.core import Anatomy, Site, dissect
from slimtune.core.insert import CHILD
from slimtune.core.sites import LINEAR, widths
from slimtune.core.stream import stream_norms
from slimtune.errors import MethodError, listing, suggest
from slimtune.sparsity.parts import Factored
from slimtune.sparsity.structure import OUT

Each = int | Sequence[int] | Mapping[str, int] | None


@dataclass(frozen=True)
class Macs:
    """MACs of each block (`encoder.0`), in the model's order.

    heads, neurons: of one head (with its share of the four projections) and of one neuron, by site.
    """

    blocks: dict[str, int]
    heads: dict[str, int]
    neurons: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.blocks.values())

    def __int__(self) -> int:
        return self.total


def count_macs(model: nn.Module, tokens: int | Mapping[str, int] = 128, heads_kept: Each = None,
               neurons_kept: Each = None, hidden_kept: int | None = None, *,
               anatomy: Anatomy | None = None) -> Macs:
    """MACs of one example's forward through the blocks of a model, whatever shapes they have by now.

    tokens: of an example, or of each tower. heads_kept, neurons_kept: count as if only so many were left: one number
    for all blocks, one for each, or by site (`encoder.0.attn.heads`). Heads that share keys count as one.
    hidden_kept: of the residual stream, which every linear map of a block reads or writes.
    Errors: MethodError for a tower whose number of tokens changes on the way, for more heads than there are, or for
    hidden dimensions of a backbone that they cannot be cut of.
    Example:
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> count_macs(model).total, count_macs(model, heads_kept=3, neurons_kept=[48, 48]).total
        (4194304, 3145728)
    """
    anatomy = anatomy or dissect(model)
    blocks = {f"{t.name}.{i}": 0 for t in anatomy.towers for i in range(len(t.blocks))}
    sites = {s.name: s for s in anatomy.sites if s.block is not None}
    heads = _missing("heads_kept", heads_kept, {n: s.heads for n, s in sites.items() if s.role == "attn.heads"})
    neurons = _missing("neurons_kept", neurons_kept, {n: s.d_out for n, s in sites.items() if s.role == "mlp.act"})
    found = Macs(blocks, {}, {})
    for tower in anatomy.towers:
        if tower.grid:
            raise MethodError(f"MACs of {anatomy.model_type} are not counted: its tokens change between stages.")
    lost, seen = _lost(anatomy, hidden_kept), set[str]()
    sites = {name: _narrower(site, lost) for name, site in sites.items()}
    for site in sites.values():
        at = f"{site.tower}.{site.block}"
        if site.role in LINEAR and site.path not in seen:
            seen.add(site.path)  # a fused projection stands at three sites
            blocks[at] += _tokens(anatomy, tokens, site)[site.cross and site.role in ("attn.k", "attn.v")] \
                * _weights(model.get_submodule(site.path), site, lost)
        if site.role == "attn.heads":
            own, other = _tokens(anatomy, tokens, site)
            blocks[at] += 2 * own * other * site.d_in
            found.heads[site.name] = _head(anatomy, sites, site, own, other)
            blocks[at] -= heads[site.name] * found.heads[site.name]
        if site.role == "mlp.act":
            own, _ = _tokens(anatomy, tokens, site)
            found.neurons[site.name] = own * sum(s.d_in if role != "mlp.down" else s.d_out for role in (
                "mlp.up", "mlp.gate", "mlp.down") if (s := sites.get(_beside(site, role))) is not None)
            blocks[at] -= neurons[site.name] * found.neurons[site.name]
    return found


def _head(anatomy: Anatomy, sites: Mapping[str, Site], site: Site, own: int, other: int) -> int:
    """MACs of one head: its rows of q, k and v, its columns of o, its scores and its weighted sum."""
    q, k, v, o = (sites[_beside(site, f"attn.{name}")] for name in "qkvo")
    total = own * (q.d_in * q.d_out + o.d_in * o.d_out) + other * (k.d_in * k.d_out + v.d_in * v.d_out)
    return (total + 2 * own * other * site.d_in) // site.heads


def _beside(site: Site, role: str) -> str:
    return site.name.removesuffix(site.role) + role


def _weights(module: nn.Module, site: Site, lost: int) -> int:
    """The weights of a linear map, but for those of so many dimensions of the stream."""
    side = module if not isinstance(module, Factored) else module.up if site.role in OUT else module.down
    rows, columns = widths(side)[1::-1]
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() > 1 and CHILD not in name.split(".")
               ) - lost * (columns if site.role in OUT else rows)


def _lost(anatomy: Anatomy, kept: int | None) -> int:
    if kept is None:
        return 0
    width = stream_norms(anatomy)[0].d_in
    if not 0 <= kept <= width:
        raise MethodError(f"count_macs: hidden_kept is {kept}, and the stream has {width} dimensions.")
    return width - kept


def _narrower(site: Site, lost: int) -> Site:
    if site.role not in LINEAR:
        return site
    return replace(site, **({"d_out": site.d_out - lost} if site.role in OUT else {"d_in": site.d_in - lost}))


def _tokens(anatomy: Anatomy, tokens: int | Mapping[str, int], site: Site) -> tuple[int, int]:
    """Tokens of the site's own tower, and of what its attention reads."""
    if isinstance(tokens, int):
        return tokens, tokens
    needed = [site.tower, *(["encoder"] if site.cross else [])]
    if missing := [name for name in needed if name not in tokens]:
        raise MethodError(f"count_macs: tokens say nothing of the {missing[0]} tower.",
                          f"Give one number, or one for each of: {' '.join(t.name for t in anatomy.towers)}")
    return tokens[site.tower], tokens[needed[-1]]


def _missing(name: str, asked: Each, units: Mapping[str, int]) -> dict[str, int]:
    """How many of each site's units are not to be counted; the sites come in the model's order."""
    if asked is None or isinstance(asked, int):
        kept = {site: number if asked is None else asked for site, number in units.items()}
    elif isinstance(asked, Mapping):
        if odd := [site for site in asked if site not in units]:
            raise MethodError(f"count_macs: {name} names '{odd[0]}', which is not there.",
                              f"There are: {listing(units, 12)}", suggest(odd[0], units))
        kept = {site: asked.get(site, number) for site, number in units.items()}
    else:
        if len(asked) != len(units):
            raise MethodError(f"count_macs: {name} has {len(asked)} numbers, and there are {len(units)} sites.",
                              "Give one number, one for each site, or a mapping by site.")
        kept = dict(zip(units, asked, strict=True))
    for site, number in kept.items():
        if not 0 <= number <= units[site]:
            raise MethodError(f"count_macs: {name} is {number} at {site}, which has {units[site]}.")
    return {site: units[site] - number for site, number in kept.items()}
