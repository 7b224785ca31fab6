"""Rearrange: other heads and neurons of the same layers, as many, that the loss lacks less together.

    per layer   min over m of (1 - m)^T F_l (1 - m),   F_l = sum g g^T,  g = dl/dm at m = 1
    one pass    for each i that lives, of the least F_ii first: with i pruned, the j whose return lowers that most lives

A search by scores takes F for its diagonal, and so prunes two units of which each makes up for the other. As many of
each layer live as before, so what the model costs stays.

Source: Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.2, and
its code for the order of the pass.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimtune.core import Delta
from slimtune.errors import MethodError
from slimtune.sparsity.gradients import Per, gradients
from slimtune.sparsity.target import Target, targets
from slimtune.sparsity.view import Batch, View, task_loss


def rearrange(delta: Delta, batches: Sequence[Batch], *, per: Per = "example",
              loss: Callable[[nn.Module, Batch], Tensor] = task_loss) -> dict[str, int]:
    """Set the gates' masks anew after prune(on="gates"), before training. Returns the swaps of each.

    per: what one gradient is of; batches cost less, and are what the code takes.
    Errors: MethodError for gates that are not pruned, or are trained already, and without data.
    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import Gates
        >>> from slimtune.sparsity.prune import prune
        >>> from slimtune.testing import batch, tiny
        >>> delta = attach(tiny("bert"), Gates())
        >>> before = prune(delta, 0.5, "fisher", on="gates", batches=[batch("bert")])
        >>> swaps = rearrange(delta, [batch("bert")])
        >>> sum(int(mask.sum()) for mask in delta.masks.values()) == before.kept
        True
    """
    gates = pruned_gates(delta, "rearrange")
    with opened(gates):
        seen = list(gradients(View(delta, gates, batches, loss=loss), "rearrange", per))
    found, swaps = {}, {}
    for name in gates:
        g = torch.stack([each[name].reshape(-1) for each in seen], 1).double()
        mask = delta.masks[name]
        found[name] = swapped(mask.reshape(-1), g @ g.mT).reshape(mask.shape)
        swaps[name] = int((found[name] & ~mask).sum())
    with torch.no_grad():
        for name, gate in gates.items():
            gate.parameter.copy_(found[name])
    delta.set_masks({**delta.masks, **found})
    if told := delta.info.get("sparsity"):
        delta.info["sparsity"] = [*told[:-1], {**told[-1], "rearranged": sum(swaps.values())}]
    return swaps


def swapped(mask: Tensor, fisher: Tensor) -> Tensor:
    """The mask after one pass. Of equal gains nothing is swapped.

    Shapes: mask and result (n,), fisher (n, n).
    Example:
        >>> g = torch.tensor([[1.0, -1.0, 1.2, 9.0]]).mT  # the first two cancel
        >>> swapped(torch.tensor([False, True, False, True]), g @ g.mT)
        tensor([False, False,  True,  True])
    """
    gone, own = (~mask).clone(), fisher.diagonal()
    pull = fisher[:, gone].sum(1)  # F (1 - m)
    living = mask.nonzero().squeeze(1)
    for i in living[own[living].argsort(stable=True)].tolist() if bool(gone.any()) else ():
        gone[i] = True
        pull = pull + fisher[:, i]
        gain = (2 * pull - own).masked_fill(~gone, -torch.inf)  # of each that comes back
        j = int(gain.argmax())
        j = j if bool(gain[j] > gain[i]) else i
        gone[j] = False
        pull = pull - fisher[:, j]
    return ~gone


def pruned_gates(delta: Delta, who: str) -> dict[str, Target]:
    """The gates of a delta that is pruned and not trained yet. Errors: MethodError for any other."""
    gates = targets(delta, "gates")
    if delta.merged or not delta.active:
        raise MethodError(f"{who} runs the model with delta '{delta.name}', which is "
                          f"{'merged' if delta.merged else 'not active'}.",
                          f"Call {'unmerge' if delta.merged else 'activate'}() first.")
    if lost := [name for name in gates if name not in delta.masks]:
        raise MethodError(f"{who}: {lost[0]} is not pruned.", "Call prune(delta, ..., on='gates') first.")
    for name, gate in gates.items():
        if not torch.equal(gate.parameter.detach(), delta.masks[name].to(gate.parameter)):
            raise MethodError(f"{who}: what lives of {name} is not 1 any more.",
                              f"{who} goes between prune(on='gates') and training.")
    return gates


@contextmanager
def opened(gates: dict[str, Target]) -> Iterator[None]:
    """All gates at 1, as before anything was pruned."""
    before = {name: gate.parameter.detach().clone() for name, gate in gates.items()}
    try:
        with torch.no_grad():
            for gate in gates.values():
                gate.parameter.fill_(1)
        yield
    finally:
        with torch.no_grad():
            for name, gate in gates.items():
                gate.parameter.copy_(before[name])
