"""sparse_linear: linear maps whose weight is mostly 0, run as sparse matrices where that is faster here and now.

    y^T = W x^T + b,   W by rows (CSR), or by rows of blocks (BSR)

A zero saves nothing in a dense kernel, and a sparse one is slower until most weights are 0; from where on, depends on
the machine, the threads and the number of tokens. So each map is measured before it is switched.
"""
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.compress.extra import quiet
from slimtune.compress.latency import latency
from slimtune.core.insert import CHILD
from slimtune.errors import SlimtuneError

BLOCKS = (4, 16)
MOST = 0.5
"""No form is tried that keeps more than this share of the numbers: none gains there."""
TOLERANCE = 1e-5
ROUNDS = 9


@dataclass(frozen=True)
class Layer:
    """What was measured of one linear map.

    density: share of its weights that are not 0. milliseconds: of the dense map, the median. speedup: by form tried,
    over dense. form: what it runs as now. why: where nothing was tried, or a form gave other numbers.
    """

    path: str
    density: float
    milliseconds: float | None
    speedup: dict[str, float]
    form: str
    why: str = ""


@dataclass(frozen=True)
class Sparsified:
    """The report of `sparsify`: every linear map of the model, in its order."""

    layers: tuple[Layer, ...]
    rows: int
    threads: int

    @property
    def switched(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.form != "dense")

    def __str__(self) -> str:
        lines = [f"{len(self.switched)} of {len(self.layers)} linear maps run sparse ({self.rows} tokens a batch, "
                 f"{self.threads} threads)"]
        for layer in self.layers:
            told = " ".join(f"{form} {gain:.2f}x" for form, gain in layer.speedup.items()) or layer.why
            lines.append(f"{layer.path}  density {layer.density:.3f}  {layer.form}  {told}")
        return "\n".join(lines)


class SparseLinear(nn.Module):
    """A linear map by a sparse weight, for inference; the dense module is kept, and comes back by `desparsify`.

    Shapes: x (..., d_in); result (..., d_out). Errors: SlimtuneError when a gradient is asked for.
    """

    def __init__(self, dense: nn.Linear, weight: Tensor) -> None:
        super().__init__()
        self.__dict__["dense"] = dense  # no child: its tensors are not this module's
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("matrix", weight, persistent=False)
        bias = None if dense.bias is None else dense.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        self.training = dense.training

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise SlimtuneError("a linear map that was made sparse gives no gradient.",
                                "Run it under torch.no_grad(), or call desparsify(model) to train.")
        matrix: Tensor = self.matrix  # type: ignore[assignment]
        y = (matrix @ x.reshape(-1, x.shape[-1]).t()).t()
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseLinear":
        twin = SparseLinear(deepcopy(self.dense, memo), self.matrix.clone())  # type: ignore[operator]
        return memo.setdefault(id(self), twin.train(self.training))


@torch.no_grad()
def sparsify(model: nn.Module, tokens: int = 128, batch: int = 1, *, gain: float = 1.1,
             measure: Callable[..., Any] = latency) -> Sparsified:
    """Let each linear map run sparse for which a short measurement on `batch * tokens` tokens shows the gain.

    Tried are CSR, and BSR where blocks of 4 by 4 or 16 by 16 are empty. Outputs are the same to 1e-5 of the largest;
    `desparsify` brings the dense modules back, the very same. For inference on a CPU; save the model before.
    measure: by default `slimtune.compress.latency`.
    Errors: SlimtuneError for a model that is not on the CPU or for no tokens.

    Example:
        >>> from slimtune.testing import tiny
        >>> report = sparsify(tiny("bert"))   # nothing of it is 0
        >>> len(report.layers), len(report.switched)
        (14, 0)
    """
    if tokens * batch < 1:
        raise SlimtuneError(f"sparsify: {batch} texts of {tokens} tokens are nothing to measure on.")
    if odd := next((p.device.type for p in model.parameters() if p.device.type != "cpu"), None):
        raise SlimtuneError(f"sparsify: the model is on {odd}; torch's sparse kernels are measured on the CPU.")
    layers = []
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not {CHILD} & set(path.split(".")):
            layers.append(_layer(model, path, module, tokens * batch, gain, measure))
    return Sparsified(tuple(layers), tokens * batch, torch.get_num_threads())


def desparsify(model: nn.Module) -> int:
    """Put every dense module back where it stood; how many there were.

    Example:
        >>> desparsify(nn.Linear(2, 2))
        0
    """
    found = [(path, module) for path, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, SparseLinear)]
    for path, module in found:
        dense: nn.Linear = module.dense  # type: ignore[assignment]
        _put(model, path, dense.train(module.training))
    return len(found)


def _layer(model: nn.Module, path: str, module: nn.Linear, rows: int, gain: float,
           measure: Callable[..., Any]) -> Layer:
    density = float((module.weight != 0).double().mean()) if module.weight.numel() else 1.0
    if why := _unfit(module, density):
        return Layer(path, density, None, {}, "dense", why)
    x = torch.randn(rows, module.in_features, generator=torch.Generator().manual_seed(0), dtype=module.weight.dtype)
    told = module(x)
    forms, why = {}, ""
    for name, weight in _forms(module.weight.detach()).items():
        form = SparseLinear(module, weight)
        difference = float((form(x) - told).abs().max()) / (float(told.abs().max()) or 1.0)
        if difference <= TOLERANCE:
            forms[name] = form
        else:
            why = f"{name} differs by {difference:.1e} of the largest output"
    calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: module(x)}
    calls |= {name: (lambda form=form: form(x)) for name, form in forms.items()}
    timed = measure(calls, rounds=ROUNDS, warmup=1)
    speedup = {name: timed.speedup[name] for name in forms}
    best = max(speedup, key=lambda name: speedup[name], default="dense")
    if best != "dense" and speedup[best] < gain:
        best = "dense"
    if best != "dense":
        _put(model, path, forms[best])
    return Layer(path, density, timed.wall["dense"].p50, speedup, best, why)


def _unfit(module: nn.Linear, density: float) -> str:
    if module._forward_hooks or module._forward_pre_hooks or module._modules:
        return "something is attached to it"
    if module.weight.dtype not in (torch.float32, torch.float64):
        return f"its weight is {module.weight.dtype}"
    return f"more than {MOST:.0%} of it are not 0" if density > MOST else ""


def _forms(weight: Tensor) -> dict[str, Tensor]:
    """The sparse matrices of a weight that keep few enough numbers."""
    with quiet():  # torch says once that its sparse layouts are in beta
        forms = {"csr": weight.to_sparse_csr()}
        for size in BLOCKS:
            if any(n % size for n in weight.shape):
                continue
            tiles = weight.unflatten(0, (-1, size)).unflatten(2, (-1, size))
            if float((tiles != 0).any(1).any(-1).double().mean()) <= MOST:
                forms[f"bsr{size}"] = weight.to_sparse_bsr((size, size))
    return forms


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
