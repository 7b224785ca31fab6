"""PEFT's LoRA, (IA)^3 and norm tuning as our methods and tensors.

A fused projection (GPT-2's c_attn) is one module to PEFT and three sites here. Its LoRA becomes one LoRA a
slice, with the same A and the slice's rows of B; with dropout each slice then draws its own mask in training.
"""
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimtune.core.method import Method, from_config
from slimtune.core.sites import Site
from slimtune.errors import DeltaError, listing
from slimtune.io.delta_folder import NOTHING
from slimtune.io.peft_config import Ia3Fields, LoraFields, Targeted
from slimtune.io.peft_names import NORM, Modules, linear_sites, no_site, pattern_value, site_patterns


@dataclass
class Found:
    """What a folder holds, in our terms: methods, the values of their tensors, and tensors of the base (by path)."""

    methods: list[Method] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Source:
    """The folder that is read, and the model it is read for."""

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    modules: Modules

    def split(self, pattern: str = "") -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """({module: {parameter: value}} of keys `<module>.<pattern>`, {path: value} of the others)."""
        own: dict[str, dict[str, Tensor]] = {}
        plain: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            name = re.sub(r"^base_model\.(model\.)?", "", key)
            if name == key:
                raise DeltaError(f"{self.where}: {key!r} is no name of PEFT's: it does not start with base_model.",
                                 NOTHING)
            if pattern and (match := re.fullmatch(rf"(.+)\.{pattern}", name)):
                own.setdefault(self.modules.must(match[1], self.where), {})[match[2]] = value
            else:
                path, _, last = name.rpartition(".")
                plain[f"{self.modules.must(path, self.where)}.{last}" if _is_plain(name) else name] = value
        return own, plain

    def check_targets(self, found: Mapping[str, object]) -> None:
        """The modules that hold tensors must be the ones the config names, no more and no less."""
        targets = self.config.get("target_modules")
        if targets is None or targets == "all-linear":
            return
        for path in self.modules.paths:
            wanted = self.modules.targeted(self.config, path)
            if wanted and path not in found:
                raise DeltaError(f"{self.where}: target_modules names {path}, and there are no tensors for it.",
                                 f"There are for: {listing(found, 8) or 'no module'}.", NOTHING)
            if not wanted and path in found:
                raise DeltaError(f"{self.where}: there are tensors for {path}, which target_modules does not name.",
                                 f"It names: {targets if isinstance(targets, str) else listing(targets, 12)}.", NOTHING)


_FOREIGN = re.compile(r"\b(lora_|ia3_|ln_tuning_layers|token_adapter|trainable_tokens|prompt_emb|original_module)")


def _is_plain(name: str) -> bool:
    return _FOREIGN.search(name) is None


def expect(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str, where: str) -> None:
    """Errors: DeltaError unless exactly these parameters are there, in these shapes."""
    if missing := [name for name in shapes if name not in values]:
        raise DeltaError(f"{where}: {path} has no {missing[0]}.", f"It has: {listing(values) or 'nothing'}.", NOTHING)
    for name, shape in shapes.items():
        if tuple(values[name].shape) != shape:
            raise DeltaError(f"{where}: {name} of {path} has shape {tuple(values[name].shape)}, and should have "
                             f"{shape}.", "Load the model it was trained on. " + NOTHING)


def read_lora(source: Source, fields: LoraFields) -> Found:
    """One LoRA for each rank and scale."""
    own, plain = source.split(r"lora_([AB])\.weight")
    source.check_targets(own)
    groups: dict[tuple[int, float], list[tuple[Site, Tensor, Tensor]]] = {}
    for path, values in own.items():
        names = source.modules.names(path)
        rank = pattern_value(fields.rank_pattern, names, fields.r)
        alpha = pattern_value(fields.alpha_pattern, names, fields.lora_alpha)
        sites = linear_sites(source.modules.anatomy, path, source.where)
        d_out = max(s.part[1] if s.part else s.d_out for s in sites)
        expect(values, {"A": (rank, sites[0].d_in), "B": (d_out, rank)}, path, source.where)
        for site in sites:
            rows = slice(*site.part) if site.part else slice(None)
            groups.setdefault((rank, alpha), []).append((site, values["A"], values["B"][rows]))
    found = Found(plain=plain)
    for number, ((rank, alpha), members) in enumerate(groups.items(), 1):
        key = "lora" if number == 1 else f"lora_{number}"
        patterns = site_patterns(source.modules.anatomy, [site for site, _, _ in members])
        found.methods.append(from_config({
            "name": "lora", "rank": rank, "alpha": alpha, "dropout": fields.lora_dropout, "rslora": fields.use_rslora,
            "sites": patterns, "head": "none"}))
        for site, a, b in members:
            found.state |= {f"{site.name}.{key}.A": a, f"{site.name}.{key}.B": b}
    return found


def read_ia3(source: Source, fields: Ia3Fields) -> Found:
    """Vectors at outputs, and at the inputs of feed-forward modules: our sites `mlp.act` and `attn.heads`."""
    own, plain = source.split(r"(ia3_l)")
    source.check_targets(own)
    anatomy, sites = source.modules.anatomy, []
    found = Found(plain=plain)
    for path, values in own.items():
        if source.modules.named(fields.feedforward_modules, path):
            inputs = {s.path: s for s in anatomy.sites if s.at == "input"}
            if (site := inputs.get(path)) is None:
                raise DeltaError(f"{source.where}: {path} is a feed-forward module, whose input is no site of slimtune "
                                 f"on {anatomy.model_type}.", f"It has the inputs of: {listing(inputs, 8)}.", NOTHING)
            expect(values, {"ia3_l": (1, site.d_in)}, path, source.where)
            here, vector = [site], values["ia3_l"][0]
        else:
            here = linear_sites(anatomy, path, source.where)
            expect(values, {"ia3_l": (max(s.part[1] if s.part else s.d_out for s in here), 1)}, path, source.where)
            vector = values["ia3_l"][:, 0]
        for site in here:
            found.state[f"{site.name}.ia3.l"] = vector[slice(*site.part) if site.part else slice(None)]
        sites += here
    if sites:
        found.methods.append(from_config({"name": "ia3", "sites": site_patterns(anatomy, sites), "head": "none"}))
    return found


def read_norms(source: Source, fields: Targeted) -> Found:
    """Norms of the base, trained as copies."""
    own, plain = source.split(r"ln_tuning_layers\.(weight|bias)")
    source.check_targets(own)
    for path, values in own.items():
        module = source.modules.model.get_submodule(path)
        if not any(s.path == path and s.role.startswith(NORM) for s in source.modules.anatomy.sites):
            raise no_site(source.modules.anatomy, path, source.where)
        expect(values, {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}, path, source.where)
        plain |= {f"{path}.{name}": value for name, value in values.items()}
    return Found(plain=plain)


def norm_method(source: Source, found: Found) -> None:
    """Move the norms among `found.plain` to a NormTuning, whichever way PEFT had trained them."""
    anatomy = source.modules.anatomy
    norms = {s.path: s for s in anatomy.sites if s.role.startswith(NORM)}
    paths = dict.fromkeys(p for key in found.plain if (p := key.rpartition(".")[0]) in norms)
    for path in paths:
        module = source.modules.model.get_submodule(path)
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        values = {n: found.plain.pop(f"{path}.{n}") for n in shapes if f"{path}.{n}" in found.plain}
        expect(values, shapes, path, source.where)
        found.state |= {f"own.{path}.{n}": value for n, value in values.items()}
    if paths:
        patterns = site_patterns(anatomy, [norms[p] for p in paths])
        found.methods.append(from_config({"name": "norm_tuning", "sites": patterns, "head": "none"}))


Reader = Callable[[Source, Any], Found]
READERS: dict[str, Reader] = {"LORA": read_lora, "IA3": read_ia3, "LN_TUNING": read_norms}
