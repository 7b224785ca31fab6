"""AdapterBias: one learned shift a layer, scaled for each token.

    y <- y + alpha(x) v,    alpha(x) = x a + c,    v = 0 at the start

x is the feed-forward network's activation, so alpha sees each token; v is the same for all.

Source: Fu et al., 2022, "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in
NLP Tasks", arXiv 2205.00305, equations 3 and 4.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Norms, Params, Site, normal, scalar, vector, zeros
from slimtune.errors import MethodError


class AdapterBias(Add):
    """A token-dependent shift behind every feed-forward network, after its dropout.

    Trains f + 1 + d numbers a block: 46,092 on BERT-base, beside 18,432 in the feed-forward norms.
    share: one alpha for all blocks, one v, or both. The paper's code trains the embeddings' norm as well:
    norms="mlp+embed".

    Shapes:
        x: (..., T, f), the feed-forward activation; y: (..., T, d), the feed-forward output.
    """

    sites: tuple[str, ...] = ("mlp",)
    norms: Norms = "mlp"
    share: Literal["none", "alpha", "v", "both"] = Field("none", description="what all blocks share")

    silent: ClassVar[dict[str, str]] = {r"(^|\.)(a|c)$": "v is 0 at the start, so the first gradient stops there"}

    def where(self, anatomy: Anatomy) -> list[Site]:
        """The feed-forward sites, reading what enters the down-projection."""
        down = {(s.tower, s.block): s for s in anatomy.sites if s.role == "mlp.down"}
        return [replace(s, source=down[s.tower, s.block].path, d_in=down[s.tower, s.block].d_in)
                if s.role == "mlp" else s for s in super().where(anatomy)]

    def params(self, site: Site) -> Params:
        return {n: i for n, i in _all(site).items() if n not in self._common()}

    def shared(self, sites: Sequence[Site]) -> Params:
        made = {n: i for n, i in _all(sites[0]).items() if n in self._common()}
        for site in sites:
            if any(_all(site)[n].shape != init.shape for n, init in made.items()):
                raise MethodError(f"AdapterBias.share='{self.share}': {sites[0].name} and {site.name} differ in width.",
                                  "Set share='none', or leave one of them out of its sites.")
        return made

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        alpha = (x * vector(p["a"], x)).sum(-1, keepdim=True) + scalar(p["c"], x)
        return y + alpha * vector(p["v"], y)

    def _common(self) -> tuple[str, ...]:
        return {"none": (), "alpha": ("a", "c"), "v": ("v",), "both": ("a", "c", "v")}[self.share]


def _all(site: Site) -> Params:
    return {"v": zeros(site.d_out), "a": normal(site.d_in), "c": zeros()}
