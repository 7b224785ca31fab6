"""TARP: a frozen weight times one low-rank matrix, elementwise, plus another.

    y = [Phi1 * W0 + Phi2] x + b

    bilinear   Phi = U V
    kronecker  Phi = sum_k H_k (x) (U_k V_k),  H_k: (n, n)
    dynamic    Phi(x) = U Sigma(x) V,  Sigma(x) = reshape(F x, (r, r)),  another one for each token

Source: Hou et al., 2022, "Meta-Learning the Difference: Preparing Large Language Models for Efficient Adaptation",
arXiv 2207.03509, equations 1 and 3. Written for a weight of (d_out, d_in), which is the paper's transposed.
"""
import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import (
    Add,
    Anatomy,
    Bound,
    Params,
    Site,
    affine,
    kaiming,
    kron_apply,
    kron_sum,
    low_rank_add,
    normal,
    vector,
    zeros,
)
from slimtune.core.linear import need_linear
from slimtune.errors import MethodError


class TARP(Add):
    """Task-adaptive reparametrisation of all linear maps of a block; a gate is none of the paper's six.

    Trains d_in r^2 + r (d_in + d_out) numbers a site and branch: 6,635,520 on RoBERTa-base at r = 8. With sigma="diag"
    d_in r stand for d_in r^2, in the bilinear form none, in the kronecker form n^3. The paper's own "Params." follow
    from none of these; GPT-2's fused projection, one layer in its code, is three sites here.
    additive, multiplicative: Phi2 and Phi1, each on or off. A dynamic Phi1 costs r products with the whole weight.
    init: "paper", all factors N(0, 0.02^2): Phi1 then starts near 0 and takes the weight away. "identity", ours: U = 0,
    and 1 + Phi1 stands for Phi1.
    compat="official": Phi1 is softplus(Phi), of a bilinear Phi where the form is dynamic. It starts at 0.69, or at 1
    with init="identity", by a constant inside the softplus.

    Mergeable where nothing is dynamic.

    Shapes:
        x: (..., T, d_in); y: (..., T, d_out); U: (d_out, r), V: (r, d_in); F: (r^2, d_in);
        kronecker: H: (n, n, n), U: (n, d_out / n, r), V: (n, r, d_in / n).
    """

    rank: int = Field(8, ge=1, description="r")
    form: Literal["dynamic", "bilinear", "kronecker"] = Field("dynamic", description="what Phi1 and Phi2 are made of")
    additive: bool = Field(True, description="Phi2, the shift")
    multiplicative: bool = Field(False, description="Phi1, the scale of the weight")
    sigma: Literal["full", "diag"] = Field("full", description="Sigma(x), of the dynamic form")
    division: int = Field(4, ge=1, description="n, of the kronecker form")
    init: Literal["paper", "identity"] = Field("paper", description="how U and Phi1 start")
    compat: Literal["paper", "official"] = Field("paper", description="whose Phi1")
    sites: tuple[str, ...] = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")

    identity: ClassVar[bool] = False
    merges_where: ClassVar[str] = "where nothing is dynamic"

    def starts_as_identity(self) -> bool:
        return self.init == "identity"

    def resting(self) -> dict[str, str]:
        little = {r"\.attn\.[qk]\.tarp": "queries and keys get little gradient, and small factors pass little of it"}
        if self.init == "identity":
            return {r"_[FHV]$": "U is 0 at the start, so the first gradient stops there"} | little
        return {r"\.tarp": "Phi1 starts near 0, and with it what comes behind"} if self.multiplicative else little

    def where(self, anatomy: Anatomy) -> list[Site]:
        if not self._branches():
            raise MethodError("TARP trains neither branch.", "Set additive, multiplicative or both.")
        return super().where(anatomy)

    def params(self, site: Site) -> Params:
        need_linear(site, "TARP")
        params: Params = {}
        for branch in self._branches():
            params |= {f"{branch}_{name}": init for name, init in self._factors(branch, site).items()}
        return params

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        if self.additive:
            y = self._shift(p, x, y)
        if not self.multiplicative:
            return y
        if self._dynamic("scale"):
            return y + self._scaled(p, x)
        return y + affine(x, self._scale(p) * p.base)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if any(self._dynamic(branch) for branch in self._branches()):
            return super().fold(p, weight, bias)  # which refuses
        new = weight + self._scale(p) * p.base if self.multiplicative else weight
        return new + self._phi(p, "shift") if self.additive else new, bias

    def _branches(self) -> list[str]:
        return ["shift"] * self.additive + ["scale"] * self.multiplicative

    def _dynamic(self, branch: str) -> bool:
        return self.form == "dynamic" and not (branch == "scale" and self.compat == "official")

    def _factors(self, branch: str, site: Site) -> Params:
        r, n, d_in, d_out = self.rank, self.division, site.d_in, site.d_out
        left = zeros if self.init == "identity" else normal
        if self.form == "kronecker":
            if d_in % n or d_out % n:
                raise MethodError(f"TARP.division={n} divides not both widths of {site.name}, {d_in} and {d_out}.",
                                  "Choose one that does.")
            return {"H": normal(n, n, n), "U": left(n, d_out // n, r), "V": normal(n, r, d_in // n)}
        factors = {"U": left(d_out, r), "V": normal(r, d_in)}
        if self._dynamic(branch):
            factors["F"] = kaiming(r * r if self.sigma == "full" else r, d_in)
        return factors

    def _phi(self, p: Bound, branch: str) -> Tensor:
        """A static Phi, (d_out, d_in)."""
        product = p[f"{branch}_U"] @ p[f"{branch}_V"]
        return kron_sum(p[f"{branch}_H"], product) if self.form == "kronecker" else product

    def _scale(self, p: Bound) -> Tensor:
        """A static Phi1 - 1, (d_out, d_in), 0 at the identity start."""
        phi = self._phi(p, "scale")
        if self.compat == "paper":
            return phi if self.init == "identity" else phi - 1
        # softplus(phi + ln(e - 1)) - 1, which is 1 - 1 at phi = 0, without the rounding
        return ((1 - 1 / math.e) * phi.expm1()).log1p() if self.init == "identity" else F.softplus(phi) - 1

    def _sigma(self, p: Bound, branch: str, x: Tensor) -> Tensor:
        """Sigma of every token, (..., T, r, r), or its diagonal, (..., T, r)."""
        flat = affine(x, p[f"{branch}_F"])
        return flat.unflatten(-1, (self.rank, self.rank)) if self.sigma == "full" else flat

    def _shift(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        """y + Phi2 x."""
        U, V = p["shift_U"], p["shift_V"]
        if self.form == "bilinear":
            return low_rank_add(y, x, V, U, 1.0)
        if self.form == "kronecker":
            return y + kron_apply(x, p["shift_H"].mT, V.mT, U.mT)
        h, sigma = affine(x, V), self._sigma(p, "shift", x)
        return y + affine((sigma * h.unsqueeze(-2)).sum(-1) if self.sigma == "full" else sigma * h, U)

    def _scaled(self, p: Bound, x: Tensor) -> Tensor:
        """((Phi1 - 1) * W0) x for a dynamic Phi1: sum_b (U Sigma)_ob (W0 (V_b * x))_o, one b after the other."""
        U, V, base, sigma = p["scale_U"], p["scale_V"], p.base, self._sigma(p, "scale", x)
        terms = [] if self.init == "identity" else [-affine(x, base)]
        for b in range(self.rank):
            left = affine(sigma[..., b], U) if self.sigma == "full" else sigma[..., b, None] * vector(U[..., b], x)
            terms.append(left * affine(x * vector(V[..., b, :], x), base))
        return sum(terms[1:], terms[0])
