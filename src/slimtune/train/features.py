"""Features: the hidden states of the frozen part, kept for each example, in place of the blocks that make them."""
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slimtune.core.delta import Delta
from slimtune.core.modes import evaluating
from slimtune.core.replay import Cut, Replay, states
from slimtune.data.examples import Collate
from slimtune.errors import DataError, TrainError
from slimtune.train.featurefile import FeatureFile

INDEX = "slimtune_index"
"""The column of a batch that tells the examples' numbers."""


class Numbered(Dataset[tuple[int, Any]]):
    """Examples with their numbers, for `numbered`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.data[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        together = getattr(self.data, "__getitems__", None)
        rows = together(indices) if together is not None else [self.data[i] for i in indices]
        return list(zip(indices, rows, strict=True))


def numbered(collate: Collate) -> Collate:
    """The collator of numbered examples: the batch, with their numbers in a column."""

    def collated(rows: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        return {**collate([row for _, row in rows]), INDEX: torch.tensor([number for number, _ in rows])}

    return collated


class Features:
    """A delta's cut and the states of all examples: `with features(batch): model(**batch).loss.backward()`.

    Inside, the frozen part is in eval mode; dropout of the head, of a side network and of the blocks that train is
    as the model's mode says.
    """

    def __init__(self, delta: Delta, cut: Cut, file: FeatureFile) -> None:
        self.delta, self.cut, self.file = delta, cut, file
        self.replay = Replay(delta.model, cut.stubs, cut.quiet)
        masks = {t.name: "attention_mask" for t in delta.anatomy.towers}
        if "encoder" in masks and "decoder" in masks:
            masks["decoder"] = "decoder_attention_mask"
        self.masks = {name: masks[tower] for name, tower in cut.towers.items()}

    @contextmanager
    def __call__(self, batch: MutableMapping[str, Any]) -> Iterator[None]:
        """Let the frozen blocks answer for this batch; the column of numbers is taken out of it."""
        examples = batch.pop(INDEX).tolist()
        ends = {mask: _ends(batch.get(mask)) for mask in set(self.masks.values())}
        with self.replay(lambda name, h: self._state(name, h, examples, ends[self.masks[name]])):
            yield

    def _state(self, name: str, h: Tensor, examples: Sequence[int], ends: Sequence[int] | None) -> Tensor:
        """The batch's state, each example's where its tokens stand, and 0 at padding. Shapes: h (B, T, d)."""
        rows, width = [self.file.rows(name, i) for i in examples], h.shape[1]
        longest = max(len(row) for row in rows)
        if len(rows) != h.shape[0] or longest > width:
            raise TrainError(f"the feature cache has {len(rows)} examples of up to {longest} tokens for {name}, and "
                             f"the batch has {h.shape[0]} of {width}.",
                             "Does the collator cut, repeat or drop examples? Then train without train.cache.")
        out = torch.empty(len(rows), width, rows[0].shape[1], dtype=rows[0].dtype)
        for i, row in enumerate(rows):
            start = width - len(row) if ends is not None and len(row) < ends[i] else 0
            out[i, :start] = 0
            out[i, start:start + len(row)] = row
            out[i, start + len(row):] = 0
        return out.to(h.device, self.cut.dtypes[name])

    def check(self, batch: dict[str, Any], rough: bool = False) -> None:
        """That a batch's states are what the plain backbone makes, and its loss the one without a cache.

        rough: it is computed in half precision. Errors: DataError when they differ by more than rounding.
        """
        given = {key: value for key, value in batch.items() if key != INDEX}
        examples, model = batch[INDEX].tolist(), self.delta.model
        with evaluating(model), torch.no_grad():
            fresh = states(self.delta, self.cut, given)
            plain = model(**given).loss
            with self(batch):
                replayed = model(**given).loss
        dtypes = {*self.cut.dtypes.values(), *(rows.dtype for rows in self.file.maps.values())}
        tolerance, of_loss = (5e-2, 1e-2) if rough or dtypes & {torch.float16, torch.bfloat16} else (1e-4, 1e-5)
        for name, state in fresh.items():
            kept = self._state(name, state, examples, _ends(given.get(self.masks[name])))
            _near(f"state {name}", kept, state.where((kept != 0).any(-1, keepdim=True), 0), tolerance)
        _near("the loss", replayed, plain, of_loss)


def _ends(mask: Any) -> list[int] | None:
    """How far each row of a mask (B, T) reaches: the position behind its last that is not masked."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return (mask.shape[1] - mask.long().flip(1).argmax(1)).tolist()


def _near(what: str, kept: Tensor, fresh: Tensor, tolerance: float) -> None:
    gap, scale = float((kept - fresh).abs().max()), float(fresh.abs().max())
    if not gap <= tolerance * max(scale, 1e-3):
        raise DataError(f"the feature cache and the model differ in {what}, by {gap:.2g} where values go up to "
                        f"{scale:.2g}.",
                        "What is kept cannot depend on padding; with padding on the left, learned positions do, unless "
                        "the batch has position_ids, and so does a loss that scores the first token. Or the delta "
                        "changes the frozen part without training it.",
                        "Train without train.cache.")
