"""Added bias: BitFit for models without biases, a vector behind every linear map and norm.

    y <- y + b,    b = 0 at the start

Source: Karimi Mahabadi et al., 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv
2106.04647, section 5.1, where BitFit is run on T5 so.
"""
from typing import ClassVar

from torch import Tensor

from slimtune.core import Add, Bound, Params, Site, vector, zeros
from slimtune.errors import MethodError


class AddedBias(Add):
    """What BitFit trains where the model has biases, this adds where it has none.

    Trains d_out numbers a site: 248,832 on T5-base, to which the paper adds one for each word of the output.

    Shapes:
        y: (..., T, d_out), the output of the linear map or norm.
    """

    sites: tuple[str, ...] = ("linear", "norm.[acm]*")  # the norms inside blocks: attn, cross, mlp

    silent: ClassVar[dict[str, str]] = {r"attn\.k\.added_bias\.b$": "one shift of all keys changes no attention weight"}
    merges_where: ClassVar[str] = "where norms have a bias"

    def params(self, site: Site) -> Params:
        return {"b": zeros(site.d_out)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y + vector(p["b"], y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None and p.site.role.startswith("norm."):
            raise MethodError(f"AddedBias cannot be merged at {p.site.name}: this norm has no bias.",
                              "Keep it attached, or leave the norms out of its sites.")
        return weight, p["b"] if bias is None else bias + p["b"]
