"""Anatomy: what a backbone is made of, read once and never changed.

    backbone -> towers -> blocks -> sites

A site is one place a method can go: a role of a block, such as `attn.q` or `mlp`, with the module
that stands there, its widths, and for a fused projection its slice. Methods speak of roles, so one
method file serves every family.
"""
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from slimtune.core.families import FAMILIES, PRETRAINED_HEADS, TASK_HEADS, TowerSpec
from slimtune.core.guess import guess, timm_tower
from slimtune.core.sites import Site, join, lookup, tower_sites
from slimtune.errors import AnatomyError, SiteError, listing, suggest


@dataclass(frozen=True)
class Tower:
    """A stack of blocks: paths from the model, and the facts methods ask for (see TowerSpec)."""

    name: str
    path: str
    blocks: tuple[str, ...]
    width: int
    embed: str
    entry: str | None
    final: str
    post_norm: bool
    causal: bool
    prefix_tokens: int
    grid: bool
    biases: tuple[str, ...]
    pools: bool


@dataclass(frozen=True)
class Anatomy:
    """The towers and sites of one backbone; `print` it to see them."""

    model_type: str
    base: str
    towers: tuple[Tower, ...]
    sites: tuple[Site, ...]
    heads: tuple[str, ...]
    guessed: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.role for site in self.sites))

    def tower(self, name: str) -> Tower:
        return next(t for t in self.towers if t.name == name)

    def select(self, patterns: Iterable[str], blocks: Sequence[int] | None = None,
               who: str = "this call") -> list[Site]:
        """The sites that match the patterns, in the order of the model.

        A pattern is a role (`attn.q`), with `self.` or `cross.`, a tower (`vision.attn.q`) or block before
        it, and `*` for any text. `blocks` counts within each tower; negative numbers count from its end.
        Errors: SiteError for a pattern or block that matches nothing; it names what exists.
        """
        chosen: dict[str, Site] = {}
        for pattern in patterns:
            found = self._index.get(pattern) or [
                s for s in self.sites if any(fnmatchcase(label, pattern) for label in s.labels)]
            if not found:
                raise SiteError(f"{who} asked for site '{pattern}', which {self.model_type} does not have.",
                                f"It has: {listing(self.roles)}",
                                f"{suggest(pattern, self.roles)} Set method.sites, or see "
                                "`slimtune inspect MODEL`.".strip())
            chosen |= {s.name: s for s in found}
        kept = [s for s in self.sites if s.name in chosen and self._in(s, blocks)]
        if chosen and not kept:
            raise SiteError(f"{who} asked for blocks {list(blocks or ())}, which match no site of {self.model_type}.",
                            "It has: " + ", ".join(f"{t.name} 0 to {len(t.blocks) - 1}" for t in self.towers),
                            "Set method.blocks.")
        return kept

    @cached_property
    def _index(self) -> dict[str, list[Site]]:
        index: dict[str, list[Site]] = {}
        for site in self.sites:
            for label in site.labels:
                index.setdefault(label, []).append(site)
        return index

    def _in(self, site: Site, blocks: Sequence[int] | None) -> bool:
        if blocks is None or site.block is None:
            return blocks is None
        depth = len(self.tower(site.tower).blocks)
        return site.block in {b % depth for b in blocks if -depth <= b < depth}

    def __str__(self) -> str:
        lines = [f"{self.model_type}{' (roles guessed from names and shapes: check them)' if self.guessed else ''}"]
        for tower in self.towers:
            lines.append(f"  {tower.name}: {len(tower.blocks)} blocks of width {tower.width}")
            shown = [s for s in self.sites if s.tower == tower.name and s.block in (0, None)]
            for site in shown:
                role = ("cross." if site.cross else "") + site.role
                part = f"[{site.part[0]}:{site.part[1]}]" if site.part else ""
                width = f"{site.d_in} -> {site.d_out}"
                lines.append(f"    {role:14s} {width:14s} {site.path}{part}{' (input)' if site.at == 'input' else ''}")
        return "\n".join([*lines, f"  head: {listing(self.heads) or 'none'}"])


def dissect(model: nn.Module, towers: Sequence[TowerSpec] | None = None) -> Anatomy:
    """The anatomy of a model of transformers 5: by the table of families, else by a guess that warns.

    Errors: AnatomyError when no Transformer blocks are found.
    Example:
        >>> from slimtune.testing import tiny
        >>> print(dissect(tiny("bert")).roles[:4])
        ('attn.q', 'attn.k', 'attn.v', 'attn.o')
    """
    root, config = _configured(model)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    base = _base_path(model, root)
    specs = tuple(towers) if towers is not None else FAMILIES.get(model_type)
    base_module = model.get_submodule(base)
    if specs is None and (known := timm_tower(base_module)) is not None:
        model_type, specs = f"timm {type(base_module).__name__}", (known,)
    guessed = specs is None
    specs = specs if specs is not None else guess(base_module)
    built = [_tower(base_module, base, spec, config) for spec in specs if _has(base_module, spec)]
    if not built:
        raise AnatomyError(f"{type(model).__name__} ({model_type}): none of its family's towers was found.",
                           f"Looked for: {listing(f'{base}.{s.path}.{s.blocks}' for s in specs)}",
                           "Pass anatomy=slimtune.dissect(model, towers=[TowerSpec(...)]) to say where its blocks are.")
    anatomy = Anatomy(model_type, base, tuple(t for t, _ in built), tuple(s for _, sites in built for s in sites),
                      _heads(model, base, {name for spec in specs for name in spec.heads}), guessed)
    if guessed:
        warnings.warn(f"slimtune does not know '{model_type}'; its roles were guessed:\n{anatomy}", stacklevel=2)
    return anatomy


def _configured(model: nn.Module) -> tuple[str, Any]:
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            return path, config
    return "", None


def _base_path(model: nn.Module, root: str) -> str:
    module = model.get_submodule(root)
    prefix = getattr(module, "base_model_prefix", "")
    return join(root, prefix) if prefix and isinstance(getattr(module, prefix, None), nn.Module) else root


def _has(base: nn.Module, spec: TowerSpec) -> bool:
    try:
        base.get_submodule(join(spec.path, spec.blocks.split(".*")[0]))
    except AttributeError:
        return False
    return True


def _heads(model: nn.Module, base: str, inside: set[str]) -> tuple[str, ...]:
    """Modules beside the base model that are not pretrained with it, and those `inside` it, by name."""
    own = [(join(base, n), m) for n, m in model.get_submodule(base).named_children()
           if n in inside or (not base and n in TASK_HEADS)]
    parent = base.rpartition(".")[0]
    # a model that is its own base has nothing beside it: what else follows its towers is pretrained
    beside = [(join(parent, n), m) for n, m in model.get_submodule(parent).named_children()] if base else []
    return tuple(p for p, m in (*own, *beside) if p != base and any(True for _ in m.parameters())
                 and p.rpartition(".")[2] not in PRETRAINED_HEADS | {"slimtune"})


def _tower(base: nn.Module, base_path: str, spec: TowerSpec, config: Any) -> tuple[Tower, list[Site]]:
    module = base.get_submodule(spec.path)
    at = join(base_path, spec.path)
    spec = _there(module, spec, config)
    paths = _block_paths(module, spec.blocks)
    entry = next((p for p in (spec.entry or "").split("|") if p and lookup(module, p) is not None), None)
    final = join(at, spec.final) if spec.final and lookup(module, spec.final) is not None else join(at, paths[-1])
    sites = tower_sites(module, at, spec, paths)
    width = next((s.d_in for s in reversed(sites) if s.role == "attn.q"), sites[-1].d_out)
    tower = Tower(spec.tower, at, tuple(join(at, p) for p in paths), width, join(at, spec.embed),
                  join(at, entry) if entry else None, final, spec.post_norm, spec.causal, spec.prefix_tokens, spec.grid,
                  tuple(join(at, p) for p in _paths(module, *(spec.biases or "").split("|"))), spec.pools)
    return tower, sites


def _there(module: nn.Module, spec: TowerSpec, config: Any) -> TowerSpec:
    """The spec with what this model says: its registers, and which of a role's alternatives it has."""
    registers = int(getattr(config, spec.registers)) if spec.registers else 0
    roles = {role: next((p for p in paths.split("|") if hasattr(lookup(module, p), "weight")), paths)
             for role, paths in spec.tower_roles.items()}
    return replace(spec, prefix_tokens=spec.prefix_tokens + registers, tower_roles=roles)


def _block_paths(module: nn.Module, pattern: str) -> list[str]:
    return _paths(module, pattern + ".*")


def _paths(module: nn.Module, *patterns: str) -> list[str]:
    """The submodules whose paths match a pattern, in their order; `*` is any index."""
    regex = re.compile("|".join(re.escape(p).replace(r"\*", r"\d+") for p in patterns))
    return [path for path, _ in module.named_modules() if path and regex.fullmatch(path)]
