"""Pfeiffer adapters: one bottleneck a block, after the feed-forward network.

Behind a post-norm residual sum z = h + res, whose norm is run twice:

    u = LN(z);  out = LN(f(u) + z),    f(u) = W_up ReLU(W_down u + b_down) + b_up

In a pre-norm block (GPT-2, T5, ViT) there is no such norm, and h <- h + f(h).

Source: Pfeiffer et al., 2021, "AdapterFusion", arXiv 2005.00247, section 3.2.2; the order of norms as in
AdapterHub's configuration of that name.
"""
from pydantic import Field

from slimtune.core import BehindNorm


class Pfeiffer(BehindNorm):
    """One sequential adapter a block; the norms stay frozen.

    Trains 2 m d + m + d numbers a block: 894,528 on BERT-base at m = 48 (reduction 16).

    Shapes:
        x: (..., T, d), the residual sum (post-norm); y: (..., T, d), its norm, or h (pre-norm).
    """

    bottleneck: int = Field(48, ge=1, description="m")
