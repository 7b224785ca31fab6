"""Storage: the bytes that a pruned matrix takes, by the way it is written down.

    n weights, d of them left, b bits a value, i bits an index
    nominal   n d b                     what would be left if no one had to know where
    bitmask   n d b + n                 one bit a weight says where
    CSR       n d (b + i) + (rows + 1) i
    N:M       n (N / M) (b + ceil(log2 M))
"""
import math
from typing import Literal

from slimtune.errors import MethodError, listing, suggest

Form = Literal["nominal", "bitmask", "csr"]
_FORMS = ("nominal", "bitmask", "csr")


def storage_bits(form: Form, weights: int, living: int, bits: int = 32, *, index: int = 32, rows: int = 0) -> int:
    """Bits of a matrix of which `living` of `weights` values are left.

    bits: of a value. index: of a column's number, in CSR. rows: of the matrix, 0 to leave the row pointers out, as
    published tables do.
    Errors: MethodError for an unknown form, or more living weights than there are.
    Example:
        >>> round(32_000 / storage_bits("bitmask", 1000, 100), 2), round(32_000 / storage_bits("csr", 1000, 100), 2)
        (7.62, 5.0)
    """
    if not 0 <= living <= weights:
        raise MethodError(f"{living} of {weights} weights cannot be left.", "Give 0 <= living <= weights.")
    if form not in _FORMS:
        raise MethodError(f"no storage '{form}'.", f"There are: {listing(_FORMS)}", suggest(form, _FORMS))
    pointers = (rows + 1) * index if rows else 0
    return living * bits + {"nominal": 0, "bitmask": weights, "csr": living * index + pointers}[form]


def nm_bits(weights: int, n: int, m: int, bits: int = 32) -> int:
    """Bits of a matrix that keeps n of every m weights, each with its place among the m.

    Errors: MethodError unless 1 <= n <= m and m divides the weights.
    Example:
        >>> nm_bits(64, 2, 4, bits=16) / (64 * 16)
        0.5625
    """
    if not 1 <= n <= m or weights % m:
        raise MethodError(f"{n} of every {m} of {weights} weights cannot be kept.",
                          "Give 1 <= n <= m, with m a divisor of the weights.")
    return weights // m * n * (bits + math.ceil(math.log2(m)))


def smallest(weights: int, living: int, bits: int = 32, *, rows: int = 0) -> tuple[str, int]:
    """The form that takes the fewest bits of those that can be read back, dense among them, and its bits.

    Example:
        >>> smallest(1000, 1000), smallest(1000, 100), smallest(1000, 10)
        (('dense', 32000), ('bitmask', 4200), ('csr', 640))
    """
    found = {"dense": weights * bits, "bitmask": storage_bits("bitmask", weights, living, bits),
             "csr": storage_bits("csr", weights, living, bits, rows=rows)}
    return min(found.items(), key=lambda item: item[1])
