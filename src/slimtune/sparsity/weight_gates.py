"""Stochastic gates on weights: W' = z * W with the weights frozen, only the gates' log_alpha learning.

While the gates are open the parameter itself holds W', written in place, so every module and kernel runs as it is.
A backward pass leaves dL/dW' in `.grad`, and the gates get

    dL/dz = sum over the block of (dL/dW' * W),    log_alpha.grad += z.backward(dL/dz)
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from slimtune.errors import DeltaError, RecipeError, listing, suggest
from slimtune.sparsity.hard_concrete import HardConcrete

Compat = Literal["paper", "official"]


class WeightGates:
    """Gates on the matrices at `paths` (parameter paths), one for each block of rows x columns.

    start: the gate at evaluation to begin with. compat="official": a gate's rows and columns are R/rows and C/columns
    apart, as the robust tickets' code tiles them, in place of contiguous blocks, and the regulariser is the mean of
    each matrix's mean in place of the mean over all gates.

    Shapes:
        log_alpha[path]: [R / rows, C / columns] for a parameter [R, C], in float32 or wider

    Errors: DeltaError for a path that is no matrix of the model; RecipeError for blocks that do not fill one.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], *, rows: int = 1, columns: int = 1,
                 start: float = 0.9, law: HardConcrete | None = None, compat: Compat = "paper",
                 generator: torch.Generator | None = None) -> None:
        self.model, self.rows, self.columns, self.compat = model, rows, columns, compat
        self.law, self.generator = law or HardConcrete(), generator
        known = dict(model.named_parameters(remove_duplicate=False))
        self.weights: dict[str, nn.Parameter] = {}
        self.log_alpha: dict[str, nn.Parameter] = {}
        self.shadow: dict[str, Tensor] = {}
        self.stale: dict[str, Tensor] = {}
        for path in paths:
            weight = self.weights[path] = _matrix(known, path)
            if rows < 1 or columns < 1 or weight.shape[0] % rows or weight.shape[1] % columns:
                raise RecipeError(f"{path} {tuple(weight.shape)} does not split into blocks of {rows} x {columns}.",
                                  "Choose divisors of its rows and columns.")
            shape = (weight.shape[0] // rows, weight.shape[1] // columns)
            wide = torch.promote_types(weight.dtype, torch.float32)  # in 16 bits gates tie, and Adam's steps overflow
            self.log_alpha[path] = nn.Parameter(torch.full(shape, self.law.start(start), device=weight.device,
                                                           dtype=wide))

    def spread(self, gates: Tensor) -> Tensor:
        """A value for each weight from one for each gate."""
        if self.rows == self.columns == 1:
            return gates
        if self.compat == "official":
            return gates.repeat(self.rows, self.columns)
        return gates.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def penalty(self) -> Tensor:
        """The expected share of gates that are not 0: over all of them, or the mean of each matrix's."""
        alive = [self.law.alive(a) for a in self.log_alpha.values()]
        if self.compat == "official":
            return torch.stack([a.mean() for a in alive]).mean()
        return torch.stack([a.sum() for a in alive]).sum() / sum(a.numel() for a in alive)

    @contextmanager
    def open(self) -> Iterator["WeightGates"]:
        """Within it the gates can be sampled; behind it weights, gradients and what is trained are as before."""
        trained = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        self.shadow = {path: weight.detach().clone() for path, weight in self.weights.items()}
        for p, _, _ in trained:
            p.grad = None
            p.requires_grad_(self.compat == "official" and p.is_floating_point())
        for weight in self.weights.values():
            weight.requires_grad_()
        try:
            yield self
        finally:
            with torch.no_grad():
                for path, weight in self.weights.items():
                    weight.copy_(self.shadow[path])
            for p, required, grad in trained:
                p.grad = grad
                p.requires_grad_(required)
            self.shadow, self.stale = {}, {}

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Around one forward and backward pass: a draw of all gates before it, their gradients behind it."""
        gates = self.write(lambda log_alpha: self.law.sample(log_alpha, self.generator))
        yield
        for path, weight in self.weights.items():
            if weight.grad is None:
                raise DeltaError(f"{path} got no gradient: the loss does not depend on it.",
                                 "Leave it out of the paths.")
            gates[path].backward(weight.grad.to(gates[path].dtype) * self.shadow[path])
            if self.compat == "official":
                with torch.no_grad():
                    old = self.stale.get(path)
                    new = weight.grad * gates[path]
                    self.stale[path] = new if old is None else old.add_(new)
            weight.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the gates' gradients to a norm of at most max_norm; returns what it was.

        compat="official": together with those of all frozen parameters, which that code never sets to 0 again.
        """
        gradients = [a.grad for a in self.log_alpha.values() if a.grad is not None]
        if self.compat == "official":
            gradients += [*self.stale.values(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale)
        return float(norm)

    def write(self, draw: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Put W' = z * W in the parameters, z = draw(log_alpha); returns z, spread to the weights' shapes."""
        gates = {path: self.spread(draw(log_alpha)) for path, log_alpha in self.log_alpha.items()}
        with torch.no_grad():
            for path, weight in self.weights.items():
                torch.mul(gates[path], self.shadow[path], out=weight)
        return gates

    def scores(self) -> dict[str, Tensor]:
        """log_alpha of each gate, detached: what tickets are drawn by."""
        return {path: log_alpha.detach() for path, log_alpha in self.log_alpha.items()}


def _matrix(known: Mapping[str, nn.Parameter], path: str) -> nn.Parameter:
    if path not in known:
        raise DeltaError(f"there is no parameter '{path}' to gate.", suggest(path, known) or
                         f"There are {len(known)}, such as {listing(list(known)[:1])}.")
    if known[path].dim() != 2 or not known[path].is_floating_point():
        raise DeltaError(f"{path} is {known[path].dtype} {tuple(known[path].shape)}.", "Gates go on matrices.")
    return known[path]
