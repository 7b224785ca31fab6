"""Gates: one learned coefficient for each attention head and each neuron of the feed-forward network.

    concat_h(head_h) <- concat_h(c_h head_h),    W_down (c * act(x)),    all c = 1 at the start
    penalty: l1 * sum |c|
    hidden: c * norm(x) at every norm, over the dimensions whose c is not 0

A coefficient of zero takes its head, neuron or dimension out, and `slimtune.shrink` then slices it off for real.

Source: Chen et al., 2021, "EarlyBERT: Efficient BERT Training via Early-bird Lottery Tickets", arXiv 2101.00063,
section 3.2 (coefficients on heads and on intermediate neurons, network slimming's l1 penalty); Michel et al., 2019,
"Are Sixteen Heads Really Better than One?", arXiv 1905.10650, section 2.3 (the gates of heads); Xia, Zhong, Chen,
2022, "Structured Pruning Learns Compact and Accurate Models", arXiv 2204.00408, section 3.1 (of hidden dimensions).
"""
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from slimtune.core import Add, Anatomy, Bound, Builder, Params, Site, Slot, ones, vector
from slimtune.core.stream import check_stream, is_centred, over_living, stream_norms
from slimtune.errors import MethodError


class Gates(Add):
    """A coefficient a head and a neuron; with grouped queries, a coefficient for all heads that share keys and values.

    hidden: a coefficient for each dimension of the residual stream too, the same at all norms of the backbone,
    whatever `sites` and `blocks` say. A norm is then over the dimensions whose coefficients are not 0 (see
    core/stream.py): `shrink` slices that exactly, and there is no such norm at the old width to merge it into.
    Other methods that act at the norms (SSF) do not go with it: pruning and `shrink` refuse them.

    Trains heads + neurons numbers a block: 37,008 on BERT-base, 37,776 with hidden. Mergeable: columns of the output
    projection and of the down-projection, scales and shifts of norms.

    Shapes:
        y: (..., T, d), what enters attn.o, its heads side by side, or mlp.down; what leaves a norm.
    Errors: MethodError for a site that is neither, for hidden where the stream does not pass norms alone, and for a
    merge when hidden dimensions are pruned.
    """

    sites: tuple[str, ...] = ("attn.heads", "mlp.act")
    l1: float = Field(0.0, ge=0, description="weight of the coefficients' l1 norm in the loss")
    hidden: bool = Field(False, description="gate the dimensions of the residual stream as well")

    def where(self, anatomy: Anatomy) -> list[Site]:
        sites = super().where(anatomy)
        for site in sites:
            if site.role not in ("attn.heads", "mlp.act"):
                raise MethodError(f"Gates scale heads and neurons, and '{site.name}' is neither.",
                                  "Choose of the sites attn.heads and mlp.act; hidden=True gates all norms.")
        return [*sites, *stream_norms(anatomy)] if self.hidden else sites

    def install(self, build: Builder) -> None:
        if self.hidden:
            check_stream(build.module, build.anatomy)
        super().install(build)

    def params(self, site: Site) -> Params:
        return {} if _is_norm(site) else {"c": ones(units(site))}

    def shared(self, sites: Sequence[Site]) -> Params:
        norms = [site for site in sites if _is_norm(site)]
        return {"hidden": ones(norms[0].d_in)} if norms else {}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        if _is_norm(p.site):
            assert p.host is not None
            return over_living(p.again, is_centred(p.host), p.base_bias, p["hidden"], x)
        return y * vector(_wide(p), y)

    def fold(self, p: Bound, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not _is_norm(p.site):
            return weight * _wide(p), bias
        c = p["hidden"]
        if not c.is_meta and not bool((c != 0).all()):
            raise MethodError(f"Gates cannot be merged at {p.site.name}: {int((c == 0).sum())} hidden dimensions are "
                              "pruned, and a norm over the others has no form at the old width.",
                              "Slice them out with shrink(), or keep the delta attached.")
        return weight * c, None if bias is None else bias * c

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        if not self.l1:
            return None
        every = {id(c): c for slot in slots for module in (slot, *slot._shared) for c in module._parameters.values()}
        return self.l1 * sum(c.abs().sum() for c in every.values() if c is not None)  # type: ignore[return-value]


def units(site: Site) -> int:
    """How many coefficients a site has: its heads that have keys of their own, or its neurons."""
    return site.heads if site.role == "attn.heads" else site.d_out


def _is_norm(site: Site) -> bool:
    return site.role.startswith("norm.")


def _wide(p: Bound) -> Tensor:
    """A coefficient for each number of y. Shapes: (units) or (B, units) -> (d) or (B, d)."""
    return p["c"].repeat_interleave(p.site.d_out // units(p.site), -1)
