"""AdapterDrop: adapters in the upper blocks only.

    y <- y + W_up GELU(W_down y + b_down) + b_up,    in the blocks k, k + 1, ..., L - 1

Source: Rückle et al., 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv 2010.11918,
section 2.1; five blocks dropped, as in the baseline of arXiv 2106.04647.
"""
from pydantic import Field

from slimtune.core import Activation, Adapter, Anatomy, InitName, Norms, Site
from slimtune.errors import SiteError


class AdapterDrop(Adapter):
    """Without norms below it (norms="none"), nothing is propagated below the lowest adapter: it trains faster.

    Trains 2 (L - k) (2 m d + m + d) numbers a tower, beside the norms.

    Shapes:
        y: (..., T, d), the sub-layer's output before the residual sum.
    """

    bottleneck: int = Field(24, ge=1, description="m")
    drop: int = Field(5, ge=0, description="k, the blocks without adapters, from the input up, per tower")
    activation: Activation = "gelu_new"
    init: InitName = "small"
    sites: tuple[str, ...] = ("self.attn", "mlp")
    norms: Norms = "all"

    def where(self, anatomy: Anatomy) -> list[Site]:
        kept = [s for s in super().where(anatomy) if s.block is None or s.block >= self.drop]
        if not kept:
            depth = max(len(t.blocks) for t in anatomy.towers)
            raise SiteError(f"AdapterDrop.drop={self.drop} leaves no block of {anatomy.model_type} with an adapter.",
                            f"Its deepest tower has {depth} blocks: choose a number below {depth}.")
        return kept
