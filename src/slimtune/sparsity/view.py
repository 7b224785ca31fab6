"""View: what a criterion sees of a delta that is to be pruned: the weights, the task's loss, and what enters a map."""
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core import Delta
from slimtune.core.modes import evaluating
from slimtune.errors import MethodError
from slimtune.sparsity.target import Target

Batch = Mapping[str, Any]


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own mean loss. Errors: MethodError when it gives none."""
    loss = model(**batch).loss
    if loss is None:
        raise MethodError(f"{type(model).__name__} returned no loss.",
                          f"The batches have: {', '.join(batch)}. Do they have labels?")
    return loss


@dataclass
class View:
    """The weights that may be pruned, and the data to judge them by.

    targets: by name of state. masks: those that hold already; a weight that is dead stays so. batches: the model's
    inputs, labels included. loss: of (model, batch), a mean over its examples. seed: of all that a criterion draws.
    notes: what criteria keep from one call to the next.
    """

    delta: Delta
    targets: dict[str, Target]
    batches: Sequence[Batch] = ()
    seed: int = 0
    loss: Callable[[nn.Module, Batch], Tensor] = task_loss
    masks: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.delta.model

    @property
    def weights(self) -> dict[str, Tensor]:
        """Values as they act, detached: 0 where a mask holds."""
        return {name: target.parameter.detach() for name, target in self.targets.items()}

    def data(self, who: str) -> Sequence[Batch]:
        """The batches. Errors: MethodError when there are none."""
        if not self.batches:
            raise MethodError(f"{who} scores weights by data, and got none.", "Pass batches=[...], labels included.")
        return self.batches

    @contextmanager
    def open(self) -> Iterator[dict[str, nn.Parameter]]:
        """The parameters with gradients on, in eval mode; everything is as before afterwards."""
        parameters = {name: target.parameter for name, target in self.targets.items()}
        frozen = [p for p in parameters.values() if not p.requires_grad]
        with evaluating(self.model):
            for p in frozen:
                p.requires_grad_(True)
            try:
                yield parameters
            finally:
                for p in frozen:
                    p.requires_grad_(False)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """dL/dW of every target on one batch; zeros where the loss does not depend on one."""
        with self.open() as parameters, torch.enable_grad():
            loss = self.loss(self.model, batch)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)}

    @contextmanager
    def inputs(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call take(name, x) with what enters each target that is a backbone's linear map, while it is open.

        Shapes: x (tokens, d_in), tokens of padding included. Errors: MethodError for a target that is none.
        """
        handles = []
        try:
            for name, target in self.targets.items():
                if target.module is None:
                    raise MethodError(f"{name} is no linear map of the backbone, whose inputs could be read.",
                                      "Prune with on='base', or choose a criterion that reads no inputs.")
                handles.append(self.model.get_submodule(target.module).register_forward_pre_hook(_reader(name, take)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def generator(self, name: str) -> torch.Generator:
        """A stream of random numbers of its own for each target."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _reader(name: str, take: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach()
        take(name, x.reshape(-1, x.shape[-1]))
    return read
