"""PHM: an adapter whose projections are sums of Kronecker products.

    W = sum_i A_i (x) B_i,    A_i (n, n),    B_i (d_in / n, d_out / n), or B_i = s_i t_i of rank r

Source: Karimi Mahabadi et al., 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv
2106.04647, equations 5 to 8.
"""
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from slimtune.core.adapter import Adapter
from slimtune.core.affine import Activation, affine, vector
from slimtune.core.bound import Bound
from slimtune.core.init import Params, normal, xavier
from slimtune.core.kronecker import kron_apply, kron_sum
from slimtune.core.method import Norms
from slimtune.core.sites import Site
from slimtune.errors import MethodError, listing

GAIN = 2**0.5


class PHM(Adapter):
    """n products a projection; the A_i its own, or one set for all sites, towers and both projections."""

    bottleneck: int = Field(24, ge=1, description="k")
    division: int = Field(4, ge=1, description="n")
    rank: int | None = Field(1, ge=1, description="rank of B_i; none for full matrices")
    shared_rule: bool = Field(True, description="one set of A_i for all sites and both projections")
    activation: Activation = "gelu_new"
    init: Literal["xavier"] = "xavier"  # pyright: ignore[reportIncompatibleVariableOverride]  (frozen: safe to narrow)
    sites: tuple[str, ...] = ("self.attn", "mlp")
    norms: Norms = "all"

    def resting(self) -> dict[str, str]:
        small = "the A_i start at 1e-4, as in the paper, so the first gradient is smaller than others by eight digits"
        return {r"\.(down|up)_[Bst]$": small} if self.shared_rule else {}

    def shared(self, sites: Sequence[Site]) -> Params:
        n = self.division
        return {"A": normal(n, n, n, std=1e-4)} if self.shared_rule else {}

    def project_params(self, name: str, d_in: int, d_out: int) -> Params:
        n = self.division
        if d_in % n or d_out % n:
            both = math.gcd(d_in, d_out)
            raise MethodError(f"{type(self).__name__}.division={n} does not divide both the site's width and the "
                              f"bottleneck: the {name}-projection is {d_in} x {d_out}.", "Choose a division of "
                              f"{listing(str(k) for k in range(1, both + 1) if both % k == 0)}, or another bottleneck.")
        rule = {} if self.shared_rule else {f"{name}_A": normal(n, n, n, std=0.01)}
        c, d, r = d_in // n, d_out // n, self.rank
        if r is None:
            return rule | {f"{name}_B": xavier(n, c, d, fan_in=c, fan_out=d, gain=GAIN)}
        return rule | {f"{name}_s": xavier(n, c, r, fan_in=c, fan_out=r, gain=GAIN),
                       f"{name}_t": xavier(n, r, d, fan_in=r, fan_out=d, gain=GAIN)}

    def project(self, p: Bound, name: str, u: Tensor) -> Tensor:
        A, bias = p["A" if self.shared_rule else f"{name}_A"], p[f"{name}_bias"]
        if self.rank is None:
            return affine(u, kron_sum(A, p[f"{name}_B"]).mT, bias)
        return kron_apply(u, A, p[f"{name}_s"], p[f"{name}_t"]) + vector(bias, u)
