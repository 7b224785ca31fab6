"""Kept: the heads, neurons and hidden dimensions that a model is to keep, by what is asked for and by its weights."""
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from slimtune.core import Anatomy, Site
from slimtune.errors import MethodError, SiteError, listing, suggest
from slimtune.sparsity.edits import inputs_of

Keep: TypeAlias = Mapping[str, Iterable[int] | Tensor]
ROLES = ("attn.heads", "mlp.act")


def units(site: Site) -> int:
    """The heads of a site that have keys of their own, or its neurons."""
    return site.heads if site.role == "attn.heads" else site.d_out


def alive(model: nn.Module, site: Site) -> Tensor:
    """Which units of a site some weight still reads. Shapes: (units)."""
    columns = (inputs_of(model.get_submodule(site.path)) != 0).any(0).cpu()
    return columns.view(units(site), -1).any(1)


def chosen(anatomy: Anatomy, keep: Keep | None) -> dict[str, Tensor]:
    """What is asked for, as booleans, by the name of the site, or `<tower>.hidden`.

    Errors: SiteError for a name that is no heads, neurons or stream of this backbone; MethodError for indices out of
    range.
    """
    numbers = {f"{tower.name}.hidden": tower.width for tower in anatomy.towers} | {
        site.name: units(site) for site in anatomy.sites if site.role in ROLES}
    found = {}
    for name, wanted in (keep or {}).items():
        if name not in numbers:
            raise SiteError(f"shrink: keep names '{name}', which is no heads or neurons of {anatomy.model_type}.",
                            f"It has: {listing(numbers, 12)}", suggest(name, numbers))
        found[name] = _mask(name, numbers[name], wanted)
    return found


def _mask(name: str, number: int, wanted: Iterable[int] | Tensor) -> Tensor:
    if isinstance(wanted, Tensor) and wanted.dtype == torch.bool:
        if wanted.shape != (number,):
            raise MethodError(f"shrink: keep['{name}'] has shape {tuple(wanted.shape)}; it has {number} units.")
        return wanted.cpu()
    indices = [int(i) for i in wanted]
    if bad := [i for i in indices if not 0 <= i < number]:
        raise MethodError(f"shrink: keep['{name}'] names {bad[0]}; its units are 0 to {number - 1}.")
    mask = torch.zeros(number, dtype=torch.bool)
    mask[indices] = True
    return mask
