"""Slot: one method at one site, and how it runs on what passes there."""
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.bound import Bound, cast
from slimtune.core.disentangled import spread
from slimtune.core.sites import Site
from slimtune.errors import MethodError


class Slot(nn.Module):
    """One method at one site: its parameters, and references to those it shares with other sites.

    kind: which hook runs it: "output", "input", "kv", "prompt", "ladder", ...
    label: its name of state, `<site>.<method>`; causal: its tower's (see Tower);
    relative: modules of the backbone that it runs beside its host (see positions.py and promptkeys.py).
    rows: examples for which its tensors carry a value each, constants where `each` names them; index: which of `all`
    examples these are, where not all; home: its insert.
    """

    method: Any
    site: Site
    kind: str
    label: str
    causal: bool
    relative: tuple[nn.Module, ...]
    rows: int | None
    index: Tensor | None
    all: int
    home: Any
    _shared: tuple[nn.Module, ...]

    def __init__(self, method: Any, site: Site, kind: str, label: str, shared: nn.Module | None = None) -> None:
        super().__init__()
        # shared stands in a tuple, so that it is not registered twice; past Module.__setattr__, which costs
        self.__dict__.update(method=method, site=site, kind=kind, label=label, causal=False, relative=(),
                             _shared=(shared,) if shared is not None else (), rows=None, index=None, all=0, home=None)

    def bind(self, like: Tensor, host: nn.Module | None = None) -> Bound:
        """The slot's tensors in the computation's dtype; master weights may be wider."""
        values: dict[str, Tensor] = {}
        for module in (*self._shared, self):
            values |= {k: cast(v, like.dtype) for k, v in module._parameters.items() if v is not None}
            if self.rows not in (None, like.shape[0]):
                each = module.__dict__.get("each", ())
                values |= {k: self._rows(values[k], like) for k, v in module._parameters.items()
                           if v is not None and (v.is_floating_point() or k in each)}
        return Bound(values, self.site, self.training, host)

    def _rows(self, value: Tensor, like: Tensor) -> Tensor:
        """An expanded tensor for a host whose rows are pieces of examples, such as windows of an image."""
        rows = like.shape[0]
        if self.rows is None or rows % self.rows:
            raise MethodError(f"{self.site.name} works on {rows} rows that all {self.rows} examples share, so nothing "
                              "there has a value for each example.", "Leave this site out of the method's sites.")
        return value.repeat_interleave(rows // self.rows, 0)

    def run(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y with this slot's method applied: to its examples, and to its slice where the projection is fused."""
        if self.rows is not None and y.shape[0] == 1 and (wide := spread(y)) is not y:
            x, y = spread(x), wide.clone()
        index = self.chosen(y.shape[0])
        return self._run(host, x, y) if index is None else y.index_copy(0, index, self._run(host, x[index], y[index]))

    def chosen(self, rows: int) -> Tensor | None:
        """Which rows of a batch are its own; None for all."""
        if self.index is None or self.all == rows:
            return self.index
        return _pieces(self.index, rows // self.all)

    def _run(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = self.bind(y, host)
        if isinstance(host, nn.Conv2d):  # patches: channels come first there
            return cast(self.method.forward(p, x.movedim(1, -1), y.movedim(1, -1)), y.dtype).movedim(-1, 1)
        if self.site.part is None:
            return cast(self.method.forward(p, x, y), y.dtype)
        start, stop = self.site.part
        piece = y[..., start:stop]
        new = cast(self.method.forward(p, x, piece), y.dtype)
        if new is piece or new._base is y:  # added in place
            return y
        return torch.cat([y[..., :start], new, y[..., stop:]], -1)


def _pieces(index: Tensor, number: int) -> Tensor:
    """Rows of examples of which each has `number`: beams, or windows."""
    return (index[:, None] * number + torch.arange(number, device=index.device)).flatten()
