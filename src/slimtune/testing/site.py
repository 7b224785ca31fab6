"""What a method does at one site: its parameters, what it read, and what it made of it."""
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.bound import cast
from slimtune.core.delta import Delta
from slimtune.core.insert import Slot
from slimtune.errors import SiteError, listing, suggest
from slimtune.testing.tiny import batch, output


@torch.no_grad()
def randomize(delta: Delta, seed: int = 0, std: float = 0.3) -> Delta:
    """Give every trained value N(0, std^2)."""
    generator = torch.Generator().manual_seed(seed)
    for p in delta.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * std)
    return delta


def site_io(delta: Delta, site: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(p, x, y, out) of one forward with random parameters: what a method read at a site, and its result.

    The inputs are those of the tiny backbone of this family. Where the graph allows it, `out` is
    connected to p, so that gradients of an equation in plain torch can be compared with the method's.
    Shapes: p as the method states them; x (..., T, d_in); y and out (..., T, d_out).
    Errors: SiteError for a site where the delta has no slot, or one that adds nothing to an output.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import IA3
        >>> from slimtune.testing.tiny import tiny
        >>> p, x, y, out = site_io(attach(tiny("bert"), IA3()), "encoder.1.attn.k")
        >>> torch.equal(out, y * p["l"])
        True
    """
    slots = {slot.site.name: slot for _, slot in delta.slots}
    if site not in slots:
        raise SiteError(f"no slot of delta '{delta.name}' is at '{site}'.", f"There are: {listing(slots)}",
                        suggest(site, slots))
    slot = slots[site]
    randomize(delta, seed)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    slot.run = _recorded(slot, seen)  # type: ignore[method-assign]
    try:
        family = delta.anatomy.model_type
        inputs = {k: v.to(_dtype(delta.model)) if v.is_floating_point() else v for k, v in batch(family).items()}
        output(delta.model, inputs)
    finally:
        del slot.run
    if not seen:
        raise SiteError(f"'{site}' was not run: {type(slot.method).__name__} does not change a module's output there.",
                        "site_io is for methods of the `add` primitive.")
    x, y, out = seen[-1]
    return {n: p for m in (*slot._shared, slot) for n, p in m._parameters.items() if p is not None}, x, y, out


def _recorded(slot: Slot, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
    def run(host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        part = slice(None) if slot.site.part is None else slice(*slot.site.part)
        before = y[..., part].detach().clone()
        read = x.detach().clone()
        out: Any = Slot.run(slot, host, x, y)
        seen.append((read, before, cast(out, y.dtype)[..., part]))
        return out
    return run


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def assert_equation(out: Tensor, wanted: Tensor, p: Mapping[str, Tensor]) -> None:
    """Fail unless two results, and their gradients for every parameter of p, are close to the dtype's precision.

    Shapes: out and wanted alike, both made from the tensors of p.
    """
    torch.testing.assert_close(out, wanted)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    found, right = (torch.autograd.grad(t, list(p.values()), weights, retain_graph=True) for t in (out, wanted))
    for name, a, b in zip(p, found, right, strict=True):
        assert b.abs().max() > 0, f"the equation has no gradient for {name}"
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"the gradient of {name}: {text}")
