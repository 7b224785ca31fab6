"""Gates: one learned coefficient for each attention head and each neuron of the feed-forward network.

    concat_h(head_h) <- concat_h(c_h head_h),   W_down (c * act(x)),    all c = 1 at the start
    penalty: l1 * sum |c|

A coefficient of zero takes its head or neuron out, and `slimtune.shrink` then slices it off for real.

Source: Chen et al., 2021, "EarlyBERT: Efficient BERT Training via Early-bird Lottery Tickets", arXiv 2101.00063,
section 3.2 (coefficients on heads and on intermediate neurons, network slimming's l1 penalty); Michel et al., 2019,
"Are Sixteen Heads Really Better than One?", arXiv 1905.10650, section 2.3 (the gates of heads).
"""
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Params, Site, Slot, ones, vector
from slimtune.errors import MethodError


class Gates(Add):
    """A coefficient a head and a neuron; with grouped queries, a coefficient for all heads that share keys and values.

    Trains heads + neurons numbers a block: 37,008 on BERT-base. Mergeable: columns of the output projection and of
    the down-projection.

    Shapes:
        y: (..., T, d), what enters attn.o, its heads side by side, or mlp.down.
    Errors: MethodError for a site that is neither.
    """

    sites: tuple[str, ...] = ("attn.heads", "mlp.act")
    l1: float = Field(0.0, ge=0, description="weight of the coefficients' l1 norm in the loss")

    def where(self, anatomy: Anatomy) -> list[Site]:
        sites = super().where(anatomy)
        for site in sites:
            if site.role not in ("attn.heads", "mlp.act"):
                raise MethodError(f"Gates scale heads and neurons, and '{site.name}' is neither.",
                                  "Choose of the sites attn.heads and mlp.act.")
        return sites

    def params(self, site: Site) -> Params:
        return {"c": ones(units(site))}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return y * vector(_wide(p), y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * _wide(p), bias

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        if not self.l1:
            return None
        return self.l1 * sum(slot._parameters["c"].abs().sum() for slot in slots)  # type: ignore[union-attr,return-value]


def units(site: Site) -> int:
    """How many coefficients a site has: its heads that have keys of their own, or its neurons."""
    return site.heads if site.role == "attn.heads" else site.d_out


def _wide(p: Bound) -> Tensor:
    """A coefficient for each number of y. Shapes: (units) or (B, units) -> (d) or (B, d)."""
    return p["c"].repeat_interleave(p.site.d_out // units(p.site), -1)
