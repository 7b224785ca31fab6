"""FacT: one tensor of all the weights' updates, in factors that all blocks share.

    Delta W_i = s U Sigma_i V^T,    TT: Sigma_i (r, r) its own;    TK: Sigma_i = sum_t P_it C_t

Each d x d slice i of a linear map has its Sigma_i: one for q, k, v and o, four for each of the feed-forward maps.
V = 0 at the start. Row vectors: y = x W.

Source: Jie and Deng, 2023, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", arXiv
2212.03145, equations 7 and 11.
"""
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Bound, Init, Params, Site, affine, kaiming, low_rank_add, uniform, xavier, zeros
from slimtune.errors import MethodError


class FacT(Add):
    """Tensor-train or Tucker factors; U and V are shared by all slices of one width of a tower.

    Trains 2 d r + N r^2 (tt) or 2 d r + N r + r^3 (tk) numbers, N being the slices: 8,448 and 13,952 on ViT-B/16
    at r = 4 and 8. compat="official" cuts the feed-forward slices of the Tucker core as the code does. A map whose
    widths are no multiple of one another has no slices and is refused. Beyond vision the mapping is ours.

    Shapes:
        x: (..., T, a d); y: (..., T, b d), one of a and b being 1; U: (r, d); V: (d, r).
    """

    form: Literal["tt", "tk"] = Field("tt", description="tensor train, or Tucker")
    rank: int = Field(16, ge=1, description="r")
    scale: float = Field(1.0, description="s")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="before V, in training; 0.1 in the paper's code")
    sites: tuple[str, ...] = ("linear",)
    compat: Literal["paper", "official"] = "paper"

    silent: ClassVar[dict[str, str]] = {r"(^|\.)(core|P|C_\w+|U_\w+)$": "V is 0, so the first gradient stops there"}

    def shared(self, sites: Sequence[Site]) -> Params:
        r, made = self.rank, Params()
        for site in sites:
            key, d = _key(site), _slices(site)[0]
            made |= {f"U_{key}": kaiming(r, d), f"V_{key}": zeros(d, r)}
            if self.form == "tk":
                made[f"C_{key}"] = xavier(r, r, r, fan_in=r * r, fan_out=r * r)
        return made

    def all_params(self, sites: Sequence[Site]) -> list[Params]:
        total: dict[str, int] = {}
        for site in sites:
            total[_key(site)] = total.get(_key(site), 0) + _slices(site)[1]
        return [self._core(_slices(site)[1], total[_key(site)]) for site in sites]

    def _core(self, slices: int, total: int) -> Params:
        r = self.rank
        if self.form == "tt":
            return {"core": uniform(slices, r, r, bound=r**-0.5)}
        init: Init = xavier(slices, r, fan_in=r, fan_out=total)
        return {"P": init}

    def cores(self, p: Bound) -> Tensor:
        """The Sigma of each slice, (..., slices, r, r)."""
        if self.form == "tt":
            return p["core"]
        cores = torch.einsum("...it,...tab->...iab", p["P"], p[f"C_{_key(p.site)}"])
        if self.compat == "paper" or cores.shape[-3] == 1:
            return cores
        mixed = cores.movedim(-3, -1).flatten(-2).unflatten(-1, cores.shape[-3:-1])   # (..., r, slices, r)
        mixed = mixed.transpose(-3, -2)
        return mixed.mT if p.site.d_in > p.site.d_out else mixed

    def factors(self, p: Bound) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r), the update being B A."""
        U, V, S = p[f"U_{_key(p.site)}"], p[f"V_{_key(p.site)}"], self.cores(p)
        if p.site.d_out > p.site.d_in:
            return U, (V[..., None, :, :] @ S.mT).flatten(-3, -2)
        return (S.mT @ U[..., None, :, :]).transpose(-3, -2).flatten(-2), V

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        if not (self.dropout and p.training):
            return low_rank_add(y, x, *self.factors(p), self.scale)
        U, V, S = p[f"U_{_key(p.site)}"], p[f"V_{_key(p.site)}"], self.cores(p)
        down = self.factors(p)[0] if p.site.d_out <= p.site.d_in else (S.mT @ U[..., None, :, :]).flatten(-3, -2)
        h = F.dropout(affine(x, down), self.dropout)
        return y + self.scale * affine(h.unflatten(-1, (-1, self.rank)), V).flatten(-2)

    def weight(self, p: Bound) -> Tensor:
        """The update of the site's weight, (d_out, d_in)."""
        A, B = self.factors(p)
        return self.scale * B @ A


def _slices(site: Site) -> tuple[int, int]:
    """(d, number of d x d slices) of a linear map."""
    small, large = sorted((site.d_in, site.d_out))
    if large % small:
        raise MethodError(f"FacT cannot cut {site.name} ({site.d_in} -> {site.d_out}) into square slices.",
                          "Leave it out of FacT's sites.")
    return small, large // small


def _key(site: Site) -> str:
    return f"{site.tower}_{_slices(site)[0]}"
