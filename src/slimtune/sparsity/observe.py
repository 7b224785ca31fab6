"""Observing: criteria whose scores are learned while the weights train.

The loop keeps a dense shadow W of each target, runs forward and backward with W' = m * W in its place, and calls

    criterion.observe(view, {name: dL/dW'}, {name: W})

after every backward pass, with the gradient as it is: of masked entries as well, before mask_gradients takes them out.
The shadow itself learns from m * dL/dW'. `score` then gives what was learned; masks are drawn from it at any time.
"""
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from slimtune.core.method import key_of
from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion
from slimtune.sparsity.view import View


class Observing(Criterion):
    """What such a criterion states: `observe`. What it has seen stands with the view, not in the configuration.

    observes: tells these from criteria that can score a model at any time.
    """

    observes: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def observe(self, view: View, gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take in one backward pass. Shapes: gradients and weights as the targets are stored."""
        raise NotImplementedError

    def seen(self, view: View) -> dict[str, Tensor]:
        """All it keeps with the view, by name: what a checkpoint holds."""
        return dict(view.notes.get(key_of(type(self)), {}))

    def resume(self, view: View, seen: Mapping[str, Tensor]) -> None:
        """Go on from what `seen` gave."""
        view.notes[key_of(type(self))] = {name: value.clone() for name, value in seen.items()}

    def _kept(self, view: View) -> dict[str, Any]:
        """The same dictionary, to be changed; empty before the first pass."""
        return view.notes.setdefault(key_of(type(self)), {})

    def _need(self, view: View, gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name in view.targets:
            if name not in gradients or name not in weights:
                raise MethodError(f"{type(self).__name__}.observe got no gradient or no weight of {name}.",
                                  "Give both for every target of the view.")
