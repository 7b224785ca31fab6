"""(IA)^3: learned vectors that rescale keys, values and the feed-forward network's activations.

    k <- l_k * k,   v <- l_v * v,   W_down (l_ff * act(x)),    all l = 1 at the start

Source: Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning" (T-Few), arXiv 2205.05638, section 3.3.
"""
from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, ones, vector


class IA3(Add):
    """Three vectors a block, and two more for a cross-attention.

    Trains d_out numbers a site: 55,296 on BERT-base. Mergeable: rows of the key and value weights, columns of the
    down-projection.

    Shapes:
        y: (..., T, d), a projection's output, or the activations that enter the down-projection.
    """

    sites: tuple[str, ...] = ("attn.k", "attn.v", "mlp.act")

    def params(self, site: Site) -> Params:
        return {"l": ones(site.d_out)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y * vector(p["l"], y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if p.site.at == "input":
            return weight * p["l"], bias
        return weight * p["l"][:, None], None if bias is None else bias * p["l"]
