"""PHM-adapter: adapters whose projections are sums of Kronecker products of full matrices.

    y <- y + W_up GELU(W_down y + b_down) + b_up,    W = sum_i A_i (x) B_i

Source: Karimi Mahabadi et al., 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv
2106.04647, equation 5 and section 5.1.
"""
from pydantic import Field

from slimtune.core import PHM


class PHMAdapter(PHM):
    """Every projection has its own A_i and full B_i.

    Trains 2 (n^3 + d k / n) + d + k numbers a site: 351,360 on T5-base at k = 24, n = 12, beside 47,616 in norms.

    Shapes:
        y: (..., T, d), the sub-layer's output before the residual sum; A: (n, n, n), B: (n, d / n, k / n).
    """

    division: int = Field(12, ge=1, description="n")
    rank: int | None = Field(None, ge=1, description="rank of B_i; none for full matrices")
    shared_rule: bool = Field(False, description="one set of A_i for all sites and both projections")
