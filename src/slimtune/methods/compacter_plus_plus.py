"""Compacter++: Compacter after the feed-forward network only.

    y <- y + W_up GELU(W_down y + b_down) + b_up,    W = sum_i A_i (x) (s_i t_i)

Source: Karimi Mahabadi et al., 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv
2106.04647, section 4.
"""
from slimtune.core import PHM


class CompacterPlusPlus(PHM):
    """One adapter a block, with all norms trained beside them.

    Trains 3 (d + k) numbers a block, and n^3 once: 57,088 on T5-base at k = 24, n = 4, beside 47,616 in norms.

    Shapes:
        y: (..., T, d), the feed-forward network's output before the residual sum.
    """

    sites: tuple[str, ...] = ("mlp",)
