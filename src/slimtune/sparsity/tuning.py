"""Tuning: coefficients for the heads and neurons that live, so that each layer gives what the whole network gave.

    per layer, in order   min over c of |A c - b|^2 + damp^2 |c - 1|^2
    A   column u: what unit u adds to the stream, W_u x_u, on all tokens, with the layers below pruned and tuned
    b   what the layer of the whole network adds, and what the stream before it has lost:  W x_T + (r_T - r_S)

in closed form, for c = 1 + d:  (A^T A + damp^2) d = A^T b - A^T A 1, with A^T A = (X^T X) * (W^T W) summed over the
numbers of each pair of units. A layer of which some c leaves [least, most] is not tuned, nor are those behind it.

r is the stream before the layer where it and the layer's output make the stream behind; with scales, windows or norms
between them (LayerScale, Swin) the layer's own output is fitted, without r.

Source: Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.3.
Its code damps A^T A in place of A, gives heads an intercept that it drops again, leaves out the first layer's heads,
and fits the last neurons to the first token alone in classification: not done here.
"""
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.core import Delta, deltas
from slimtune.core.method import key_of
from slimtune.core.modes import evaluating
from slimtune.errors import MethodError
from slimtune.sparsity.calibration import real_tokens
from slimtune.sparsity.rearrange import opened, pruned_gates
from slimtune.sparsity.structure import OUT, at_site, tied
from slimtune.sparsity.sublayer import run, sublayer
from slimtune.sparsity.target import Target
from slimtune.sparsity.view import Batch, View

log = logging.getLogger("slimtune")


def tune_gates(delta: Delta, batches: Sequence[Batch], *, damp: float = 1.0, least: float = -10.0,
               most: float = 10.0) -> dict[str, Tensor]:
    """Set the gates that live to what makes up best for those that do not; returns the coefficients that were set.

    For after prune(on="gates"), and `rearrange`, before training; needs no labels. It runs the model twice for each
    gate and batch, up to that gate's layer.
    damp: how close they stay to 1. least, most: beyond these the fit is refused, and it ends there.

    Errors: MethodError for gates that are not pruned, or are trained already, without data, and where another method
    adds to the layer's output map.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import Gates
        >>> from slimtune.sparsity.prune import prune
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), Gates())
        >>> found = prune(delta, 0.5, "fisher", on="gates", batches=[batch("bert")])
        >>> len(tune_gates(delta, [batch("bert")])), len(delta.masks)
        (4, 4)
    """
    if damp <= 0 or not least <= 1 <= most:
        raise MethodError(f"tune_gates: damp={damp}, least={least}, most={most}.",
                          "Choose damp > 0 and least <= 1 <= most.")
    gates = pruned_gates(delta, "tune_gates")
    _check_alone(delta, gates)
    data = View(delta, gates, batches).data("tune_gates")
    found: dict[str, Tensor] = {}
    for name in [n for n in gates if bool(delta.masks[n].any())]:
        with evaluating(delta.model):
            ata, atb = _equations(delta, gates, name, data)
        c = 1 + damped(ata, atb - ata.sum(1), damp)
        if not bool(((c >= least) & (c <= most)).all()):
            log.warning("tune_gates: coefficients of %s would be %.3g to %.3g; it and the layers behind it stay as "
                        "they are", name, float(c.min()), float(c.max()))
            break
        with torch.no_grad():
            gates[name].parameter[delta.masks[name]] = c.to(gates[name].parameter)
        found[name] = gates[name].parameter.detach().clone()
    if told := delta.info.get("sparsity"):
        delta.info["sparsity"] = [*told[:-1], {**told[-1], "tuned": len(found)}]
    return found


def damped(ata: Tensor, rest: Tensor, damp: float) -> Tensor:
    """The d of min |A d - b|^2 + damp^2 |d|^2. Shapes: ata (n, n), rest = A^T b and result (n,).

    Example:
        >>> damped(torch.tensor([[3.0]]), torch.tensor([8.0]), 1.0)
        tensor([2.])
    """
    return torch.linalg.solve(ata + damp**2 * torch.eye(len(ata), dtype=ata.dtype, device=ata.device), rest)


def _equations(delta: Delta, gates: dict[str, Target], name: str, data: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """A^T A and A^T b of the units that live. Shapes: (units, units), (units,)."""
    gate, layer, mask = gates[name], sublayer(delta, gates[name]), delta.masks[name]
    module = delta.model.get_submodule(layer.out.path)
    w = at_site(module._parameters["weight"].detach(), layer.out).double()  # type: ignore[union-attr]
    bias = module._parameters.get("bias")
    width = w.shape[1] // mask.numel()
    alive = mask.reshape(-1).repeat_interleave(width)
    w, gram, right, adds = w[:, alive], 0.0, 0.0, True
    for number, batch in enumerate(data):
        with opened(gates):
            whole = run(delta.model, batch, layer)
        with opened({name: gate}):
            part = run(delta.model, batch, layer)
        adds = whole.adds_up if number == 0 else adds
        real = real_tokens(View(delta, gates), gate, batch)
        keep = slice(None) if real is None or real.numel() != len(part.x) else real.to(part.x.device)
        goal = whole.y + whole.r - part.r if adds else whole.y
        goal = (goal if bias is None else goal - bias.detach())[keep].double()
        x = part.x[keep][:, alive].double()
        gram, right = gram + x.mT @ x, right + (x * (goal @ w)).sum(0)
    each = len(w[0]) // width
    ata = (gram * (w.mT @ w)).reshape(each, width, each, width).sum((1, 3))
    return ata, right.reshape(each, width).sum(1)  # type: ignore[union-attr]


def _check_alone(delta: Delta, gates: dict[str, Target]) -> None:
    """Errors: MethodError where more than W makes the output."""
    outs = {site.path for gate in gates.values() for site in tied(delta, gate) if site.role in OUT}
    for other in deltas(delta.model).values():
        for _, slot in other.slots if other.active else ():
            if slot.site.path in outs and key_of(type(slot.method)) != "gates":
                raise MethodError(f"tune_gates fits what {slot.site.path} gives, and {type(slot.method).__name__} adds "
                                  "to it.", "Attach it behind, when the gates are tuned.")
