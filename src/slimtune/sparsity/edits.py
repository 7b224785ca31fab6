"""Edits: changes of a model that can all be taken back, and the cuts that are made of them."""
from typing import Any

from torch import Tensor, nn

from slimtune.errors import MethodError
from slimtune.sparsity.parts import Factored

_ABSENT = object()


class Edits:
    """What was changed: every pointer that was moved, and where it pointed before; no tensor is written to.

    Example:
        >>> import torch
        >>> linear, edits = nn.Linear(3, 2), Edits()
        >>> edits.rows(linear, torch.tensor([1]))
        >>> linear(torch.zeros(1, 3)).shape
        torch.Size([1, 1])
        >>> edits.undo()
        >>> linear.out_features, linear.weight.shape
        (2, torch.Size([2, 3]))
    """

    def __init__(self) -> None:
        self.done: list[tuple[dict[str, Any], str, Any]] = []

    def undo(self) -> None:
        """Everything as it was."""
        for table, key, old in reversed(self.done):
            if old is _ABSENT:
                table.pop(key, None)
            else:
                table[key] = old
        self.done.clear()

    def _put(self, table: dict[str, Any], key: str, new: Any) -> None:
        self.done.append((table, key, table.get(key, _ABSENT)))
        table[key] = new

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute of a module or config."""
        self._put(vars(owner), name, value)

    def module(self, model: nn.Module, path: str, new: nn.Module) -> None:
        """Let another module stand at a path."""
        parent, _, name = path.rpartition(".")
        self._put(model.get_submodule(parent)._modules, name, new)

    def tensor(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Let another parameter stand in a module; one that was trained stays so."""
        old = module._parameters.get(name)
        needs = old is not None and old.requires_grad
        self.parameter(module, name, nn.Parameter(value.detach(), requires_grad=needs))

    def parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> None:
        """Let this very parameter stand in a module."""
        self._put(module._parameters, name, value)

    def rows(self, module: nn.Module, kept: Tensor) -> None:
        """Keep these outputs of a linear map, in this order. kept: their indices."""
        if isinstance(module, Factored):
            self.rows(module.up, kept)
            self.attribute(module, "out_features", len(kept))
            return
        transposed = _kind(module)
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        kept = kept.to(weight.device)
        self.tensor(module, "weight", weight.index_select(1 if transposed else 0, kept))
        if bias is not None:
            self.tensor(module, "bias", bias.index_select(0, kept))
        self.attribute(module, "nf" if transposed else "out_features", len(kept))

    def columns(self, module: nn.Module, kept: Tensor) -> None:
        """Keep these inputs of a linear map, in this order. kept: their indices."""
        if isinstance(module, Factored):
            self.columns(module.down, kept)
            self.attribute(module, "in_features", len(kept))
            return
        transposed = _kind(module)
        weight = module._parameters["weight"]
        assert weight is not None
        self.tensor(module, "weight", weight.index_select(0 if transposed else 1, kept.to(weight.device)))
        self.attribute(module, "nx" if transposed else "in_features", len(kept))


def inputs_of(module: nn.Module) -> Tensor:
    """The weights that read a linear map's input, (rows, d_in)."""
    if isinstance(module, Factored):
        return module.down.weight
    transposed, weight = _kind(module), module._parameters["weight"]
    assert weight is not None
    return weight.mT if transposed else weight


def _kind(module: nn.Module) -> bool:
    """Whether a linear map stores (in, out). Errors: MethodError for what is no linear map, or is quantised."""
    name, weight = type(module).__name__, module._parameters.get("weight")
    if name not in ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D") or weight is None:
        raise MethodError(f"a {name} cannot be sliced.", "Shrink takes Linear and Conv1D modules; shrink the model "
                          "before it is quantised.")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise MethodError(f"a {name} of {weight.dtype} cannot be sliced.", "Shrink the model before it is quantised.")
    return name == "Conv1D"
