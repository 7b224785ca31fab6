"""Compacter: adapters whose projections are sums of Kronecker products, with one set of A_i for all of them.

    y <- y + W_up GELU(W_down y + b_down) + b_up,    W = sum_i A_i (x) (s_i t_i)

Source: Karimi Mahabadi et al., 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv
2106.04647, equation 8.
"""
from slimtune.core import PHM


class Compacter(PHM):
    """After the self-attention and the feed-forward network of every block, with all norms trained beside them.

    Trains 3 (d + k) numbers a site, and n^3 once: 114,112 on T5-base at k = 24, n = 4, beside 47,616 in norms.
    shared_rule=False gives every projection its own A_i.

    Shapes:
        y: (..., T, d), the sub-layer's output before the residual sum.
        A: (n, n, n); s: (n, d / n, 1), t: (n, 1, k / n) of the down-projection.
    """
