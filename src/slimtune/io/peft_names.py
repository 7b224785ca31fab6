"""PEFT's names and ours: module paths of transformers 4 and 5, target patterns, and the sites they stand for."""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.insert import CHILD
from slimtune.core.sites import Site
from slimtune.errors import DeltaError, listing, suggest

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
NORM = "norm."


class Modules:
    """The modules of one model by path, and by the path they had in checkpoints of transformers 4."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.paths = [p for p, _ in model.named_modules() if p and CHILD not in p.split(".")]
        self._known = frozenset(self.paths)
        self._forward, backward = _renamings(model)
        self._old = {path: _rename(path, backward) for path in self.paths}

    def find(self, path: str) -> str | None:
        """The model's path of a module that a file names, or None: as it is, else by transformers' own renaming."""
        for candidate in (path, _rename(path, self._forward)):
            if candidate in self._known:
                return candidate
        return None

    def must(self, path: str, where: str) -> str:
        """The same. Errors: DeltaError for a module that the model does not have."""
        found = self.find(path)
        if found is None:
            raise DeltaError(f"{where}: {path} is no module of this {self.anatomy.model_type}.",
                             suggest(path, self.paths), "Load the model class it was trained on; nothing was loaded.")
        return found

    def targeted(self, config: Mapping[str, Any], path: str) -> bool:
        """Whether PEFT's config names this module as a target, by its path of today or of transformers 4."""
        return any(_targeted(config, name) for name in (path, self._old[path]))

    def named(self, targets: Any, path: str) -> bool:
        """Whether a list of suffixes, or a regular expression, names this module."""
        return any(matches(targets, name) for name in (path, self._old[path]))

    def names(self, path: str) -> tuple[str, str]:
        return path, self._old[path]


def _renamings(model: nn.Module) -> tuple[list[Any], list[Any]]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], []
    found = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]
    return found, [t.reverse_transform() for t in reversed(found)]


def _rename(path: str, renamings: Sequence[Any]) -> str:
    """A module's path, renamed as the key of its weight is: some patterns end with a dot."""
    key = f"{path}.weight"
    for renaming in renamings:
        key = renaming.rename_source_key(key)[0]
    return key.removesuffix(".weight")


def matches(targets: Any, path: str) -> bool:
    """PEFT's rule: a text is a regular expression for the whole path, a list holds paths or their endings.

    Example:
        >>> matches(["query"], "encoder.layer.0.attention.self.query"), matches(["ery"], "a.query")
        (True, False)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == t or path.endswith(f".{t}") for t in targets or ())


def _targeted(config: Mapping[str, Any], path: str) -> bool:
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save") or ()
    if excluded and matches(excluded, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
        return False
    targets = config.get("target_modules")
    if not matches(targets, path):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{lead}{pattern}\.(\d+)\.", path):
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def pattern_value(patterns: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a module; its keys are endings, as regular expressions.

    Example:
        >>> pattern_value({"c_attn": 8}, ["h.0.attn.c_attn"], 4), pattern_value({"c_attn": 8}, ["h.0.mlp.c_fc"], 4)
        (8, 4)
    """
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def linear_sites(anatomy: Anatomy, path: str, where: str) -> list[Site]:
    """Our sites at the output of a linear module: one, or the slices of a fused projection.

    Errors: DeltaError for a module that no site stands for.
    """
    found = [s for s in anatomy.sites if s.path == path and s.at == "output" and s.role in LINEARS]
    if not found:
        raise no_site(anatomy, path, where)
    return found


def no_site(anatomy: Anatomy, path: str, where: str) -> DeltaError:
    return DeltaError(f"{where}: {path} is none of the sites slimtune has on {anatomy.model_type}.",
                      f"It has: {listing(r for r in anatomy.roles if r in LINEARS or r.startswith(NORM))}.",
                      "Leave that module out of target_modules and train again; nothing was loaded.")


def site_patterns(anatomy: Anatomy, sites: Sequence[Site]) -> tuple[str, ...]:
    """The shortest patterns that name exactly these sites.

    Example:
        >>> from slimtune.core import dissect
        >>> from slimtune.testing import tiny
        >>> anatomy = dissect(tiny("t5"))
        >>> site_patterns(anatomy, [s for s in anatomy.sites if s.role == "attn.q" and s.tower == "decoder"])
        ('decoder.attn.q',)
    """
    wanted = {s.name for s in sites}
    labelled: dict[str, set[str]] = {}
    for site in anatomy.sites:
        for label in site.labels:
            labelled.setdefault(label, set()).add(site.name)
    chosen: list[str] = []
    covered: set[str] = set()
    for site in (s for s in anatomy.sites if s.name in wanted):
        if site.name not in covered:
            chosen.append(next(label for label in site.labels if labelled[label] <= wanted))
            covered |= labelled[chosen[-1]]
    return tuple(chosen)
