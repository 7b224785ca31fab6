"""Bottleneck adapter: any point of the unified view's design space.

    y <- y + s f(u),    f(u) = W_up act(W_down u + b_down) + b_up,    u = y or x

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366,
table 1.
"""
from slimtune.core import Adapter


class BottleneckAdapter(Adapter):
    """Sequential or parallel, at attention or feed-forward sites, scaled, with a layer norm or without.

    Trains m (d_in + d_out) + m + d_out numbers a site, 2 d more with a layer norm, 1 more with a learned scale.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """
