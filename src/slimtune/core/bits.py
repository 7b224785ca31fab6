"""Bits: a mask as one bit an entry, and a masked tensor as its bits and the values that live.

    bytes(mask) = ceil(n / 8);    bytes(tensor) = ceil(n / 8) + |mask|_0 b
"""
import torch
from torch import Tensor

from slimtune.errors import DeltaError

_WEIGHTS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """One bit an entry, the first in the highest bit, as uint8.

    Shapes: mask (...), bool; result (ceil(n / 8),).

    Example:
        >>> pack(torch.tensor([True, False, True])).tolist()
        [160]
    """
    flat = mask.detach().cpu().reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * _WEIGHTS).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask that `pack` packed. Errors: DeltaError for bits of another size, or set behind the last entry."""
    count = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-count // 8),):
        raise DeltaError(f"a mask of shape {tuple(shape)} has {-(-count // 8)} bytes, and these are "
                         f"{bits.dtype} {tuple(bits.shape)}.", "Nothing was loaded.")
    flat = (bits.cpu()[:, None] & _WEIGHTS).ne(0).reshape(-1)
    if bool(flat[count:].any()):
        raise DeltaError(f"a mask of shape {tuple(shape)} has bits behind its last entry.", "Nothing was loaded.")
    return flat[:count].reshape(shape)


def living(tensor: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, in order; `spread` puts them back."""
    return tensor.detach()[mask]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """A tensor of the mask's shape, 0 where it is not set. Errors: DeltaError for another number of values.

    Example:
        >>> spread(torch.tensor([5.0, 7.0]), torch.tensor([[True, False], [False, True]])).tolist()
        [[5.0, 0.0], [0.0, 7.0]]
    """
    if values.dim() != 1 or values.numel() != int(mask.sum()):
        raise DeltaError(f"a mask keeps {int(mask.sum())} values, and {tuple(values.shape)} were given.",
                         "Nothing was loaded.")
    full = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    full[mask.to(values.device)] = values
    return full
