"""Structure: in what a model differs from the one its config makes, as data that makes it again.

    modules      {path: {"kind", ...}}      modules of another kind: see KINDS
    shapes       {tensor: [...]}            tensors of another shape
    attributes   {path: {name: value}}      numbers and texts of another value, such as counts of heads

Nothing is found by name: whatever was cut, factored or taken out shows in the comparison.
"""
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.insert import CHILD
from slimtune.core.sites import join, lookup
from slimtune.errors import DeltaError
from slimtune.sparsity.parts import Constant, Factored, Silent

NOTHING = "Nothing was loaded."
_STATE = frozenset({"training", "gradient_checkpointing"})


KINDS: dict[str, tuple[type[nn.Module], Callable[[Any], dict[str, Any]], Callable[[Mapping[str, Any]], nn.Module]]] = {
    "constant": (Constant, lambda m: {"width": m.out_features, "bias": m.bias is not None},
                 lambda told: Constant(told["width"], told["bias"])),
    "factored": (Factored, lambda m: {"in": m.in_features, "out": m.out_features, "rank": m.down.out_features,
                                      "bias": m.up.bias is not None},
                 lambda told: Factored(told["in"], told["out"], told["rank"], told["bias"])),
    "silent": (Silent, lambda m: {"width": m.width, "bias": m.bias is not None, "layer": m.layer_idx},
               lambda told: Silent(told["width"], told["bias"], told["layer"])),
    "identity": (nn.Identity, lambda m: {}, lambda told: nn.Identity()),
}
"""Kinds of modules that may stand where a config makes another: type, what describes one, what makes one."""


@dataclass
class Structure:
    """See the module."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(model: nn.Module, plain: nn.Module) -> Structure:
    """In what a model differs from the plain one of its config, which may be on the meta device.

    Errors: DeltaError for a module that could not be made again.
    """
    found, theirs = Structure(), dict(plain.named_modules())
    skip: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(done) for done in skip):
            continue
        other = theirs.get(path)
        if other is not None and type(other) is type(module):
            if changed := _attributes(module, other):
                found.attributes[path] = changed
            continue
        found.modules[path] = _describe(path, module, other)
        skip.append(path + ".")
    ours = dict(model.named_modules())
    if lost := next((p for p in theirs if p not in ours and not any(p.startswith(done) for done in skip)), None):
        raise DeltaError(f"this {type(model).__name__} has no {lost}, which its config makes.",
                         "Only what shrink takes out can be saved.")
    plain_shapes = {n: list(t.shape) for n, t in plain.state_dict().items()}
    found.shapes = {n: list(t.shape) for n, t in model.state_dict().items()
                    if plain_shapes.get(n) != list(t.shape) and not any(n.startswith(done) for done in skip)}
    if odd := next((n for n in found.shapes if n not in plain_shapes), None):
        raise DeltaError(f"this {type(model).__name__} has a tensor {odd}, which its config does not make.",
                         "Only what shrink makes can be saved.")
    return found


def _describe(path: str, module: nn.Module, other: nn.Module | None) -> dict[str, Any]:
    kind = next((k for k, (cls, _, _) in KINDS.items() if type(module) is cls), None)
    if kind is None or other is None:
        where = "stands where its config makes nothing" if other is None else f"replaces a {type(other).__name__}"
        raise DeltaError(f"{path} is a {type(module).__name__} that {where}, and could not be made again.",
                         "Save the model before it is quantised, compiled or wrapped.")
    return {"kind": kind, **KINDS[kind][1](module)}


def _attributes(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    theirs = vars(other)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(module).items()
            if _plain(value) and name not in _STATE and not name.startswith("_") and name in theirs
            and type(theirs[name]) is type(value) and theirs[name] != value}


def _plain(value: Any) -> bool:
    return type(value) in (int, float, str) or (type(value) is tuple and all(type(v) is int for v in value))


def rebuild(model: nn.Module, told: Any, rename: Callable[[str], str | None], where: str) -> None:
    """Make a plain model's modules and attributes those of a saved structure; shapes come with the tensors.

    rename: a saved path as the model has it, None for one that it has not.
    Errors: DeltaError for what is no such structure, or does not fit the model.
    """
    try:
        structure = Structure(**told)
        modules = {rename(path): KINDS[said["kind"]][2](said) for path, said in structure.modules.items()}
        values = {rename(path): dict(said) for path, said in structure.attributes.items()}
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise DeltaError(f"{where}: its structure is malformed ({error}).", NOTHING) from error
    like = next(model.parameters())
    for path, module in modules.items():
        if path is not None:
            parent, _, name = path.rpartition(".")
            if (home := lookup(model, parent)) is None or name not in home._modules:
                raise DeltaError(f"{where}: names a module {path}, which a {type(model).__name__} has not.", NOTHING)
            home._modules[name] = module.to(device=like.device, dtype=like.dtype)
    for path, said in values.items():
        if path is not None:
            _set(lookup(model, path), path, said, where)


def _set(module: nn.Module | None, path: str, said: Mapping[str, Any], where: str) -> None:
    for name, value in said.items():
        value = tuple(value) if isinstance(value, list) else value
        old = None if module is None else vars(module).get(name)
        if module is None or not _plain(value) or type(old) is not type(value):
            raise DeltaError(f"{where}: sets {join(path, name)}, which is no number or text of this model.", NOTHING)
        vars(module)[name] = value


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and lasting buffers by name, each once: of a tied one, the first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if CHILD not in name.split("."):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], shapes: Mapping[str, Any],
                keep_dtype: bool) -> tuple[list[str], list[str]]:
    """Let the given tensors stand in a model; those it has no place for are left.

    shapes: of tensors that need not have the model's. Returns (missing, mismatched): what stays as it was.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    missing, mismatched = [], []
    for names in aliases.values():
        name = next((n for n in names if n in tensors), None)
        if name is None:
            missing.append(names[0])
            continue
        old = _entry(model, name)
        if tensors[name].shape != old.shape and list(tensors[name].shape) != shapes.get(name):
            mismatched.append(name)
            continue
        # a copy of its own: the file's bytes are all one piece, and not aligned as kernels like it
        value: Tensor = tensors[name].to(device=old.device, dtype=None if keep_dtype else old.dtype, copy=True)
        new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for alias in names:
            _entry(model, alias, new)
    return missing, mismatched


def _entry(model: nn.Module, name: str, new: Tensor | None = None) -> Tensor:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    table: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
    if new is not None:
        table[key] = new
    return table[key]


def meta_like(model: nn.Module, config: Any) -> nn.Module:
    """The plain model of a config and of the model's class, on the meta device."""
    with torch.device("meta"):
        return type(model)(config)
