"""Survey: one look at every example, for what must know them all before training."""
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, uint8

from slimtune.data.examples import Collate
from slimtune.errors import DataError

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class Survey:
    """digest: SHA-256 over every example as the model gets it; shapes: of each example's tensors, when it is alone."""

    digest: str = ""
    shapes: list[Shapes] = field(default_factory=list)

    def order(self) -> list[int]:
        """The examples, those of one shape together, the longest first."""
        return sorted(range(len(self.shapes)), key=lambda i: (self.size(i), self.shapes[i]), reverse=True)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Examples of one shape, at most `size`.

        Example:
            >>> shapes = [(("input_ids", (1, n)),) for n in (2, 3, 2, 2)]
            >>> list(Survey("", shapes).batches(2))
            [[1], [0, 2], [3]]
        """
        batch: list[int] = []
        for i in self.order():
            if batch and (len(batch) == size or self.shapes[i] != self.shapes[batch[0]]):
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def size(self, example: int) -> int:
        """Numbers of an example, those of an axis alone (a class) not counted."""
        return sum(math.prod(shape) for _, shape in self.shapes[example] if len(shape) > 1) or 1

    def spread(self, count: int) -> list[int]:
        """Up to `count` examples, from the longest to the shortest."""
        order = self.order()
        return list(dict.fromkeys(order[i * (len(order) - 1) // max(count - 1, 1)] for i in range(count)))


def survey(data: Any, collate: Collate) -> Survey:
    """Read every example once, and up to eight again, as of other epochs.

    Errors: DataError when one is not the same again.
    """
    found, digest, again = Survey(), hashlib.sha256(), {i * (len(data) - 1) // 7 for i in range(8)}
    for i in range(len(data)):
        one = collate([data[i]])
        own = encoded(one)
        if i in again and any(_of_epoch(epoch, data, collate, i) != own for epoch in (1, 2)):
            raise DataError(f"example {i} is another each time it is read; a feature cache would hold one draw of it.",
                            "Take the random numbers out of the data and the collator (data.augment=[] for images), or "
                            "train without train.cache.")
        digest.update(own)
        found.shapes.append(tuple((key, tuple(v.shape)) for key, v in sorted(one.items()) if isinstance(v, Tensor)))
    found.digest = digest.hexdigest()
    return found


def _of_epoch(epoch: int, data: Any, collate: Collate, example: int) -> bytes:
    tell = getattr(data, "set_epoch", lambda epoch: None)
    tell(epoch)
    try:
        return encoded(collate([data[example]]))
    finally:
        tell(0)


def encoded(batch: Mapping[str, Any]) -> bytes:
    """SHA-256 over a batch: names, types, shapes and bits."""
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        digest.update(f"{key}:".encode())
        digest.update(bits(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.digest()


def bits(tensor: Tensor) -> bytes:
    """SHA-256 over a tensor's type, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
    return digest.digest()


def joined(named: Mapping[str, Tensor], leave: Sequence[str] = ()) -> str:
    """SHA-256 over named tensors, but for names that begin with one of `leave`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        if not name.startswith(tuple(leave)):
            digest.update(name.encode() + bits(tensor))
    return digest.hexdigest()
