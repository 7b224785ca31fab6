"""Sizes on disk: the table of published ratios, and the bytes that packing really takes."""
import io

import pytest
import torch
from scipy.sparse import csr_matrix

from slimtune.core.bits import living, pack, spread, unpack
from slimtune.errors import MethodError
from slimtune.sparsity.storage import nm_bits, smallest, storage_bits

TABLE = {0.80: (5.00, 20.00, 4.32, 12.31, 2.50), 0.85: (6.67, 26.67, 5.52, 14.55, 3.33),
         0.90: (10.00, 40.00, 7.62, 17.78, 5.00), 0.95: (20.00, 80.00, 12.31, 22.86, 10.00),
         0.97: (33.33, 133.33, 16.33, 25.81, 16.67)}
"""Sparsity: how many times smaller than dense float32 by nominal float32 and int8, bitmask of both, CSR of 32 bits."""


@pytest.mark.parametrize("sparsity", TABLE)
def test_the_table_of_ratios(sparsity):
    n = 1_000_000
    left = round(n * (1 - sparsity))
    found = [32 * n / storage_bits(form, n, left, bits) for form, bits in
             (("nominal", 32), ("nominal", 8), ("bitmask", 32), ("bitmask", 8), ("csr", 32))]
    assert [round(ratio, 2) for ratio in found] == list(TABLE[sparsity])


@pytest.mark.parametrize(("n", "m", "bits", "share"), [(2, 4, 16, 0.5625), (2, 4, 8, 0.625), (4, 8, 16, 0.59375),
                                                       (1, 1, 32, 1.0)])
def test_n_of_m(n, m, bits, share):
    assert nm_bits(m * 100, n, m, bits) / (m * 100 * bits) == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_sizes_are_those_of_the_bytes_that_bring_a_tensor_back(dtype):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(13, 11, generator=g) < 0.3
    weight = (torch.randn(13, 11, generator=g) * 50).to(dtype) * mask
    weight[mask.nonzero()[0][0], mask.nonzero()[0][1]] = 0  # lives, and is 0
    bits, values = pack(mask), living(weight, mask)
    width = 8 * values.element_size()
    assert bits.numel() == -(-mask.numel() // 8)
    assert 8 * (bits.numel() + values.numel() * values.element_size()) - storage_bits(
        "bitmask", 143, int(mask.sum()), width) == -143 % 8
    again = spread(values, unpack(bits, (13, 11)))
    assert again.dtype == dtype
    assert torch.equal(again, weight)
    assert torch.equal(unpack(bits, (13, 11)), mask)


def test_csr_is_what_scipy_holds():
    mask = torch.rand(13, 11, generator=torch.Generator().manual_seed(0)) < 0.3
    matrix = csr_matrix(mask.float().numpy())
    held = 8 * (matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes)
    assert storage_bits("csr", 143, int(mask.sum()), rows=13) == held


def test_packed_bits_are_numpys():
    import numpy as np

    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    assert pack(mask).numpy().tobytes() == np.packbits(mask.numpy()).tobytes()
    assert pack(torch.zeros(0, dtype=torch.bool)).numel() == 0
    file = io.BytesIO()
    torch.save(pack(mask), file)
    assert unpack(torch.load(io.BytesIO(file.getvalue())), (5, 7)).equal(mask)


@pytest.mark.parametrize(("left", "form"), [(1000, "dense"), (990, "dense"), (960, "bitmask"), (40, "bitmask"),
                                            (30, "csr")])
def test_the_smallest_form(left, form):
    """Bitmask beats dense below 1 - 1/32, and CSR beats bitmask below 1/32."""
    name, bits = smallest(1000, left)
    assert name == form
    assert bits == min(32_000, 1000 + 32 * left, 64 * left)


def test_what_cannot_be():
    with pytest.raises(MethodError, match="no storage 'bitmsk'"):
        storage_bits("bitmsk", 10, 5)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="11 of 10"):
        storage_bits("csr", 10, 11)
    with pytest.raises(MethodError, match="5 of every 4"):
        nm_bits(8, 5, 4)
    with pytest.raises(MethodError, match="2 of every 4 of 6"):
        nm_bits(6, 2, 4)
