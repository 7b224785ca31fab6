"""Sites: the places of one tower where a method can go, read from its modules."""
import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from slimtune.core.families import TowerSpec

LINEAR = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")


@dataclass(frozen=True)
class Site:
    """One place. `name` is what files and messages call it: `encoder.1.attn.q`, `decoder.0.cross.attn.v`.

    tower, block (None for the tower's own norms), role; cross: the encoder-decoder attention.
    path: the module whose output (`at="output"`) or input (`at="input"`) a method changes.
    d_in, d_out: widths of what a method reads and writes.
    source: the module whose input is x, when it is not `path` itself (the sub-layer sites `attn`, `mlp`).
    part: (start, stop) of a fused projection's output; transposed: the weight is (in, out), as in Conv1D.
    attention, heads, head_dim: the attention module, its key/value heads and their width.
    prefix: tokens before an image's patches, for a method that asks its tower for it.
    """

    tower: str
    block: int | None
    role: str
    path: str
    d_in: int
    d_out: int
    at: Literal["output", "input"] = "output"
    cross: bool = False
    source: str | None = None
    part: tuple[int, int] | None = None
    transposed: bool = False
    attention: str | None = None
    heads: int = 0
    head_dim: int = 0
    prefix: int = 0

    @property
    def name(self) -> str:
        block = [] if self.block is None else [str(self.block)]
        return ".".join([self.tower, *block, *(["cross"] if self.cross else []), self.role])

    @property
    def labels(self) -> tuple[str, ...]:
        """The patterns that name this site, from the shortest: role, kind and role, tower and role.

        `linear` stands for every linear map of a block.
        """
        roles = [self.role, *(["linear"] if self.role in LINEAR else [])]
        kinds = [*roles, *(f"{'cross' if self.cross else 'self'}.{role}" for role in roles)]
        return (*kinds, *(f"{self.tower}.{kind}" for kind in kinds), self.name)


def tower_sites(tower: nn.Module, at: str, spec: TowerSpec, blocks: list[str]) -> list[Site]:
    """All sites of a tower, block by block, the tower's own last. `at` is the tower's path in the model."""
    sites = [site for index, path in enumerate(blocks)
             for site in _block_sites(tower.get_submodule(path), join(at, path), index, spec)]
    for role, path in {"embed": spec.embed, **spec.tower_roles}.items():
        module = lookup(tower, path)
        if module is not None and getattr(module, "weight", None) is not None:
            d_in, d_out, _ = widths(module)
            sites.append(Site(spec.tower, None, role, join(at, path), d_in, d_out))
    return sites


def _block_sites(block: nn.Module, at: str, index: int, spec: TowerSpec) -> list[Site]:
    own = {role: found for role, path in spec.roles.items() if (found := _resolve(block, path)) is not None}
    sites: list[Site] = []
    for cross in (False, True):
        sites += _attention_sites(block, at, index, spec, own, cross)
    sites += [_plain(block, at, index, spec, role, own[role])
              for role in ("mlp.up", "mlp.gate", "mlp.down") if role in own]
    if "mlp.down" in own and "mlp.up" in own:
        up, down = (widths(block.get_submodule(own[r][0])) for r in ("mlp.up", "mlp.down"))
        down_path = join(at, own["mlp.down"][0])
        sites.append(Site(spec.tower, index, "mlp.act", down_path, down[0], down[0], at="input", transposed=down[2]))
        out = join(at, own["mlp"][0]) if "mlp" in own else down_path
        sites.append(Site(spec.tower, index, "mlp", out, up[0], down[1], source=join(at, own["mlp.up"][0])))
    width = next((s.d_in for s in sites if s.role in ("attn.q", "mlp.up")), None)
    if width is not None:  # a block of convolutions alone has no width of tokens
        sites.append(Site(spec.tower, index, "block", at, width, width))
    return sites + [_plain(block, at, index, spec, role, own[role]) for role in own if role.startswith("norm.")
                    and not isinstance(lookup(block, own[role][0]), nn.Identity)]


def _attention_sites(block: nn.Module, at: str, index: int, spec: TowerSpec,
                     own: dict[str, tuple[str, int, int]], cross: bool) -> list[Site]:
    kind = "cross." if cross else ""
    if f"{kind}attn.q" not in own:
        return []
    linears = [_plain(block, at, index, spec, role, own[kind + role], cross)
               for role in ("attn.q", "attn.k", "attn.v", "attn.o") if kind + role in own]
    by_role = {s.role: s for s in linears}
    query, key, out = by_role["attn.q"], by_role["attn.k"], by_role["attn.o"]
    attention = query.path.rpartition(".")[0]
    head_dim = _head_dim(block.get_submodule(attention.removeprefix(at + ".")), query.d_out)
    # DeBERTa runs its query projection on relative positions as well, so x is read where only tokens pass
    source = query.path if cross else by_role["attn.v"].path
    facts = {"cross": cross, "attention": attention, "heads": key.d_out // head_dim, "head_dim": head_dim}
    path = join(at, own[kind + "attn"][0]) if kind + "attn" in own else out.path
    return [*linears,
            Site(spec.tower, index, "attn.heads", out.path, out.d_in, out.d_in, at="input", transposed=out.transposed,
                 **facts),
            Site(spec.tower, index, "attn", path, query.d_in, out.d_out, source=source, **facts)]


def _plain(block: nn.Module, at: str, index: int, spec: TowerSpec, role: str,
           found: tuple[str, int, int], cross: bool = False) -> Site:
    path, piece, pieces = found
    d_in, d_out, transposed = widths(block.get_submodule(path))
    part = (piece * d_out // pieces, (piece + 1) * d_out // pieces) if pieces > 1 else None
    return Site(spec.tower, index, role, join(at, path), d_in, d_out // pieces, cross=cross, part=part,
                transposed=transposed)


def _resolve(block: nn.Module, spec: str) -> tuple[str, int, int] | None:
    """(path, piece, pieces) of the first alternative of `a|b[i/n]` that the block has."""
    for choice in spec.split("|"):
        match = re.fullmatch(r"(.+?)(?:\[(\d+)/(\d+)\])?", choice)
        if match and (module := lookup(block, match[1])) is not None and _there(module):
            return match[1], int(match[2] or 0), int(match[3] or 1)
    return None


def _there(module: nn.Module) -> bool:
    """Whether something is left of it: a shrunk model has linear maps of no width."""
    weight = module._parameters.get("weight")
    return getattr(module, "in_features", 1) > 0 if weight is None else weight.numel() > 0


def _head_dim(attention: nn.Module, width: int) -> int:
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        if isinstance(value := getattr(attention, name, None), int):
            return value
    heads = next((getattr(attention, n) for n in ("num_attention_heads", "num_heads", "n_heads")
                  if isinstance(getattr(attention, n, None), int)), 1)
    return width // heads


def lookup(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def join(*parts: str) -> str:
    """Module paths joined with dots; empty ones vanish.

    Example:
        >>> join("bert", "", "encoder")
        'bert.encoder'
    """
    return ".".join(p for p in parts if p)


def widths(module: nn.Module) -> tuple[int, int, bool]:
    """(d_in, d_out, transposed) of a linear map, convolution of patches, norm or embedding."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):  # a linear map of low rank, or a quantised one that hides its weight
        return module.in_features, module.out_features, False  # type: ignore[return-value]
    if weight.dim() == 1:
        return weight.shape[0], weight.shape[0], False
    if type(module).__name__ == "Conv1D":  # GPT-2 stores (in, out)
        return weight.shape[0], weight.shape[1], True
    if isinstance(module, nn.Embedding):
        return weight.shape[0], weight.shape[1], False
    return weight[0].numel(), weight.shape[0], False
