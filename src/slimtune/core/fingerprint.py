"""Fingerprint of a backbone: shapes and sampled bytes of every site, in a few milliseconds.

It is keyed by roles, not module paths, so it survives a renaming in transformers. `rounded` compares
samples as bfloat16, so that a delta trained on a float32 base loads on its bfloat16 copy; `exact`
compares the very bits, and is asked for where the delta stores differences from the base.
"""
import hashlib

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.insert import CHILD, Root
from slimtune.core.unfreeze import base_parameters

SAMPLES = 8


def fingerprint(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """{"shapes", "rounded", "exact"}: hexadecimal digests of the base's tensors, whatever deltas are active."""
    shapes, samples = hashlib.sha256(), []
    for name, tensor in _base_tensors(model, anatomy):
        shapes.update(f"{name}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES])
    digests = {"shapes": shapes.hexdigest()[:32]}
    if samples and samples[0].device.type == "meta":
        return digests
    values = torch.cat([s.cpu() for s in samples]) if len({s.dtype for s in samples}) == 1 else torch.cat(
        [s.cpu().float() for s in samples])
    return digests | {"rounded": _digest(values.to(torch.bfloat16)), "exact": _digest(values)}


def _base_tensors(model: nn.Module, anatomy: Anatomy) -> list[tuple[str, Tensor]]:
    root = model._modules.get(CHILD)
    attached = root.deltas.values() if isinstance(root, Root) else ()
    swapped = {id(own.value): own.base for delta in attached for own in delta.owned}
    found: dict[str, Tensor] = {}
    for site in anatomy.sites:
        module = model.get_submodule(site.path)
        for name, p in module.named_parameters(recurse=False):
            found.setdefault(f"{site.path}.{name}", swapped.get(id(p), p))
    roles = {}
    for site in anatomy.sites:
        roles.setdefault(site.path, site.name)
    return [(f"{roles[path.rpartition('.')[0]]}.{path.rpartition('.')[2]}", t) for path, t in found.items()]


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def bits_digest(model: nn.Module) -> str:
    """SHA-256 over every bit of every base tensor: slow, for tests and for a careful user."""
    digest = hashlib.sha256()
    for path, p in sorted(base_parameters(model).items()):
        digest.update(path.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
