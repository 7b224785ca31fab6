"""traced: an encoder's forward as an exporter sees it: named inputs, one output, two axes that may vary.

Masks are added and not asked about (attention by its plain formula): of the graphs an exporter makes of one model,
this one is the fastest in int8 in onnxruntime, and no slower in float32.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.keyvalues import PREFIX
from slimtune.core.modes import evaluating
from slimtune.errors import SlimtuneError, TrainError, listing

TOLERANCE = 1e-4
Run = Callable[[Mapping[str, Tensor]], Tensor]
"""From a batch to logits."""
_LABELS = ("labels", "start_positions", "end_positions")
_TYPES = (torch.int64, torch.int32, torch.float32)


@dataclass(frozen=True)
class Proof:
    """On which shapes a graph was run beside its model, and the largest difference of their outputs."""

    shapes: tuple[tuple[int, ...], ...]
    difference: float


class Traced(nn.Module):
    """The model as a function of its inputs in order, to its logits.

    inputs: the tensors of an example batch, all but the labels; its numbers and booleans stay what they are.
    Errors: SlimtuneError for a batch without tensors, or with one that is neither text nor image, and for a model
    that gives no logits for it, or whose weights are not float32.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        super().__init__()
        _check_dtype(model)
        self.model = model
        self.fixed = {name: value for name, value in batch.items() if isinstance(value, bool | int | float)}
        self.inputs = _inputs(batch, self.fixed)
        with evaluating(model), torch.no_grad():
            out = model(**self.inputs, **self.fixed)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise SlimtuneError(f"a {type(model).__name__} gives no logits; models that classify are exported.",
                                "Give the folder of a run, or of a model with a head.")

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.inputs, values, strict=True)), **self.fixed).logits


def _inputs(batch: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {name: value for name, value in batch.items() if name not in (*_LABELS, *fixed)}
    odd = [name for name, v in found.items() if not isinstance(v, Tensor) or v.dim() not in (2, 4)
           or v.dtype not in _TYPES or not v.numel()]
    if odd or not found:
        raise SlimtuneError(f"the example batch holds {listing(found) or 'nothing'}, which cannot be exported"
                            + (f": {odd[0]} is neither ids of texts (batch, tokens) nor images." if odd else "."),
                            "Give a batch as the model takes it: input_ids and attention_mask, or pixel_values.")
    return {name: value.detach().cpu() for name, value in found.items()}


def resized(inputs: Mapping[str, Tensor], rows: int, tokens: int | None) -> dict[str, Tensor]:
    """A batch of another shape, of the same values over and over; of several texts the last one is padded.

    Example:
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        >>> resized(inputs, 2, 4)["attention_mask"].tolist()
        [[1, 1, 1, 1], [1, 1, 0, 0]]
    """
    found = {}
    for name, value in inputs.items():
        value = value[torch.arange(rows) % len(value)]
        if value.dim() == 2 and tokens is not None:
            value = value[:, torch.arange(tokens) % value.shape[1]]
            if name == "attention_mask" and rows > 1:
                value[-1, -(-tokens // 2):] = 0
        found[name] = value.contiguous()
    return found


def shapes_to_try(subject: Traced) -> list[tuple[int, int | None]]:
    """(rows, tokens): the batch's own shape, one text, and others of more and of fewer tokens that the model reads."""
    inputs = subject.inputs
    texts = [v for v in inputs.values() if v.dim() == 2]
    rows = len(next(iter(inputs.values())))
    if not texts:
        return [(max(rows, 2), None), (1, None), (rows + 3, None)]
    tokens, limit = texts[0].shape[1], longest(subject.model)
    tries = [(max(rows, 2), tokens), (1, tokens + 3), (rows + 3, 2 * tokens), (2, max(2, tokens // 2))]
    return list(dict.fromkeys((r, min(t, limit)) for r, t in tries))


def longest(model: nn.Module) -> int:
    """How many tokens the model's positions can tell apart; RoBERTa's start behind its padding id."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or 512
    return max(2, limit - (getattr(config, "pad_token_id", None) or 0) - 1)


def _check_dtype(model: nn.Module) -> None:
    if odd := {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}:
        raise SlimtuneError(f"the model's weights are {listing(map(str, odd))}; it is exported from float32.",
                            "Call model.float() first; choose int8 for a smaller file.")


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention by its formula, so that masks are added; where a delta's keys go through it, as it is."""
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    settable: Any = model if hasattr(model, "set_attn_implementation") else None
    if settable is None or chosen in (None, "eager") or chosen.startswith(PREFIX):
        yield
        return
    try:
        settable.set_attn_implementation("eager")
        yield
    finally:
        settable.set_attn_implementation(chosen)


@torch.no_grad()
def prove(subject: Traced, run: Run, tolerance: float | None = TOLERANCE) -> Proof:
    """Run a graph beside its model, as that is, on several shapes. tolerance: None to measure only.

    Errors: TrainError when an output has another shape, is not finite, or differs by more.
    """
    shapes, worst = [], 0.0
    with evaluating(subject.model):
        for rows, tokens in shapes_to_try(subject):
            batch = resized(subject.inputs, rows, tokens)
            told, now = subject(*batch.values()), run(batch)
            shape = (rows,) if tokens is None else (rows, tokens)
            if told.shape != now.shape:
                raise TrainError(f"the exported graph gives {tuple(now.shape)} for a batch of {shape}, its model "
                                 f"{tuple(told.shape)}.", "Nothing was written.")
            difference = float((told - now).abs().max())
            limit = torch.finfo(torch.float32).max if tolerance is None else tolerance
            if not difference <= limit:
                raise TrainError(f"the exported graph differs from its model by {difference:.1e} for a batch of "
                                 f"{shape}; {limit:.0e} is allowed.", "Nothing was written.")
            shapes.append(shape)
            worst = max(worst, difference)
    return Proof(tuple(shapes), worst)
