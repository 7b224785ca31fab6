"""SSF: scaling and shifting of the features behind every linear map and norm.

    y <- gamma * y + beta,    gamma ~ N(1, 0.02^2), beta ~ N(0, 0.02^2)

Source: Lian et al., 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv
2210.08823, equation 3.
"""
from typing import ClassVar

from torch import Tensor

from slimtune.core import Add, Bound, Init, Params, Site, normal, vector
from slimtune.errors import MethodError


class SSF(Add):
    """Two vectors a place, which merge into the weight and bias before them.

    Trains 2 d_out numbers a place: 205,824 on ViT-B/16.

    Shapes:
        y: (..., T, d_out), the output of the linear map or norm.
    """

    sites: tuple[str, ...] = ("embed", "linear", "norm.*")
    identity: ClassVar[bool] = False
    merges_where: ClassVar[str] = "where norms have a bias"
    silent: ClassVar[dict[str, str]] = {r"attn\.k\.ssf\.beta$": "one shift of all keys changes no attention weight"}

    def params(self, site: Site) -> Params:
        return {"gamma": Init((site.d_out,), lambda t, g: t.normal_(1.0, 0.02, generator=g)),
                "beta": normal(site.d_out)}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y * vector(p["gamma"], y) + vector(p["beta"], y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None and p.site.role.startswith("norm."):
            raise MethodError(f"SSF cannot be merged at {p.site.name}: this norm has no bias to take beta.",
                              "Keep it attached, or leave the norms out of its sites.")
        if p.site.role == "embed" and weight.dim() == 2:                         # a table of rows
            return weight * p["gamma"] + p["beta"], None
        scaled = weight * p["gamma"].view(-1, *[1] * (weight.dim() - 1))
        return scaled, p["beta"] if bias is None else bias * p["gamma"] + p["beta"]
