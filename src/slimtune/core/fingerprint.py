"""Fingerprint of a backbone: shapes and sampled bytes of every site, in a few milliseconds.

It is keyed by roles, not module paths, so it survives a renaming in transformers. `rounded` compares
samples as bfloat16, so that a delta trained on a float32 base loads on its bfloat16 copy; `exact`
compares the very bits, and is asked for where the delta stores differences from the base.
"""
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.insert import CHILD, Root
from slimtune.core.unfreeze import base_parameters

SAMPLES = 8


def fingerprint(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """{"shapes", "rounded", "exact"}: hexadecimal digests of the base's tensors, whatever deltas are active.

    While deltas are attached the digests are kept, and made anew when a tensor was written or replaced.
    """
    root = model._modules.get(CHILD)
    if not isinstance(root, Root):
        return _digests([(name, module._parameters[key]) for name, module, key in _places(model, anatomy)])
    if root.places is None:
        root.places = _places(model, anatomy)
    owned = [own for name in root.plan.active for own in root.deltas[name].owned]  # no other's stand in the model
    for own in owned:
        own.follow()
    swapped: dict[int, Tensor] = {id(own.value): own.base for own in owned}
    swapped |= {id(m._parameters[key]): p for delta in root.deltas.values() for m, key, p in delta._unmerge}
    tensors = [(name, module._parameters[key]) for name, module, key in root.places]
    tensors = [(name, swapped.get(id(t), t)) for name, t in tensors]
    state = tuple((id(t), t.data_ptr(), t._version) for _, t in tensors if t is not None)
    if root.digests is None or root.digests[0] != state:
        root.digests = (state, _digests(tensors))
    return root.digests[1]


def _digests(tensors: Sequence[tuple[str, Tensor | None]]) -> dict[str, str]:
    shapes, samples = hashlib.sha256(), []
    for name, tensor in tensors:
        if tensor is not None:
            shapes.update(f"{name}:{tuple(tensor.shape)};".encode())
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES])
    digests = {"shapes": shapes.hexdigest()[:32]}
    if samples and samples[0].device.type == "meta":
        return digests
    mixed = len({s.dtype for s in samples}) > 1
    values = torch.cat([s.cpu().float() if mixed else s.cpu() for s in samples])
    return digests | {"rounded": _digest(values.to(torch.bfloat16)), "exact": _digest(values)}


def _places(model: nn.Module, anatomy: Anatomy) -> list[tuple[str, nn.Module, str]]:
    """(name by role, module, parameter's name) of every tensor of every site, each once."""
    roles: dict[str, str] = {}
    for site in anatomy.sites:
        roles.setdefault(site.path, site.name)
    return [(f"{role}.{key}", module, key) for path, role in roles.items()
            for module in (model.get_submodule(path),) for key, p in module._parameters.items() if p is not None]


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def content(signature: str, *tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what a delta is: its methods and sites, and every bit of these tensors with their names."""
    digest = hashlib.sha256(signature.encode())
    for name, t in sorted((name, t) for named in tensors for name, t in named.items()):
        digest.update(f"\n{name}:{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bits_digest(model: nn.Module) -> str:
    """SHA-256 over every bit of every base tensor: slow, for tests and for a careful user."""
    digest = hashlib.sha256()
    for path, p in sorted(base_parameters(model).items()):
        digest.update(path.encode() + p.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
