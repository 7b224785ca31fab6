"""ImageRows: the images of a split as rows, decoded once into memory where they fit, else each time they are read."""
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from slimtune.data.picture import CorruptImageError, Picture, decode
from slimtune.data.transform import Transform, drawn_by

MEMORY = 2**30
"""Bytes of a split that are kept decoded."""
Row = dict[str, Any]


class ImageRows(Sequence[Row]):
    """Rows of pixel_values, bytes (3, S, S), and labels. Every image has been decoded once before there is a row.

    labels: class indices, or None. seed: of the augmentation, which depends on it, the epoch and the row alone.
    bad: images that could not be decoded and are left out.
    """

    def __init__(self, pictures: Sequence[Picture], labels: Sequence[int] | None, transform: Transform,
                 seed: int = 0) -> None:
        """Decode every image, in threads: Pillow lets go of the interpreter."""
        self.transform, self.seed, self.epoch = transform, seed, 0
        self.bad: list[CorruptImageError] = []
        self.kept: list[Tensor] | None = []
        good, size = [], 0
        for i, found in enumerate(_each(self._try, pictures)):
            if isinstance(found, CorruptImageError):
                self.bad.append(found)
                continue
            good.append(i)
            if self.kept is not None:
                self.kept.append(found)
                size += found.numel()
                if size > MEMORY:
                    self.kept = None
        self.pictures = [pictures[i] for i in good]
        self.labels = None if labels is None else [labels[i] for i in good]

    def _try(self, picture: Picture) -> Tensor | CorruptImageError:
        try:
            return self.transform.shrink(decode(picture))
        except CorruptImageError as error:
            return error

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        pixels = self.transform.shrink(decode(self.pictures[index])) if self.kept is None else self.kept[index]
        if self.transform.training:
            pixels = self.transform.place(pixels, drawn_by(self.seed, self.epoch, index % len(self)))
        return {"pixel_values": pixels} | ({} if self.labels is None else {"labels": self.labels[index]})

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Several rows, decoded in threads where they are not in memory."""
        return [self[i] for i in indices] if self.kept is not None else list(_each(self.__getitem__, indices))

    def plain(self, count: int) -> "ImageRows":
        """The first images, without augmentation."""
        labels = None if self.labels is None else self.labels[:count]
        return ImageRows(self.pictures[:count], labels, self.transform.plain(), self.seed)


def _each(work: Any, items: Sequence[Any]) -> Iterator[Any]:
    """The results in order, from threads where there is more than one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2 or len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(cores, 8)) as threads:
        for start in range(0, len(items), 256):  # so that not all results are held at once
            yield from threads.map(work, items[start:start + 256])

