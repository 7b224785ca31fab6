"""Prefix tuning: trained keys and values in front of every attention's own.

    head = softmax([q P_k^T ; q k^T] / sqrt(c)) [P_v ; v]

Flat, P_k and P_v are trained themselves; reparametrised, they come from a small network that is
dropped after training:

    [P_k ; P_v] = W_2 tanh(W_1 E + b_1) + b_2,    E: (l, d)

Source: Li and Liang, 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190, section 4.3. One network for encoder, decoder and cross-attention each, as in the code.
"""
import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from slimtune.core import Bound, KeysValues, Params, Site, Slot, affine, kaiming, normal, uniform


class PrefixTuning(KeysValues):
    """l pairs of keys and values an attention.

    positions="before" lets the prefix take the first l positions, as the paper's code does, where it is a cache.

    Trains 2 l d numbers an attention: 552,960 on BERT-base at l = 30; with hidden = 512 it trains
    9,872,384 and stores 552,960.

    Shapes:
        key, value: (l, heads * head_dim) an attention; with an example axis (B, l, heads * head_dim).
    """

    length: int = Field(30, ge=1, description="l")
    hidden: int | None = Field(None, ge=1, description="width of the reparametrisation; none by default")
    sites: tuple[str, ...] = ("attn",)

    def params(self, site: Site) -> Params:
        if self.hidden is not None:
            return {}
        width = site.heads * site.head_dim
        return {"key": normal(self.length, width), "value": normal(self.length, width)}

    def shared(self, sites: Sequence[Site]) -> Params:
        params: Params = {}
        if self.hidden is None:
            return params
        for kind in dict.fromkeys(_kind(s) for s in sites):
            own = [s for s in sites if _kind(s) == kind]
            d = own[0].d_in
            bound = 1 / math.sqrt(self.hidden)
            params |= {f"{kind}_embedding": normal(self.length, d, std=1.0),
                       f"{kind}_down": kaiming(self.hidden, d),
                       f"{kind}_down_bias": uniform(self.hidden, bound=1 / math.sqrt(d))}
            for site in own:
                out = 2 * site.heads * site.head_dim
                params |= {f"{kind}_up_{site.block}": uniform(out, self.hidden, bound=bound),
                           f"{kind}_up_bias_{site.block}": uniform(out, bound=bound)}
        return params

    def keys_values(self, p: Bound) -> tuple[Tensor, Tensor]:
        if self.hidden is None:
            return p["key"], p["value"]
        kind, block = _kind(p.site), p.site.block
        h = affine(p[f"{kind}_embedding"], p[f"{kind}_down"], p[f"{kind}_down_bias"]).tanh()
        key, value = affine(h, p[f"{kind}_up_{block}"], p[f"{kind}_up_bias_{block}"]).chunk(2, -1)
        return key, value

    def final(self, slots: list[Slot]) -> tuple[Any, dict[str, Tensor]] | None:
        """The flat prefix that gives the same keys and values: the network is dropped."""
        if self.hidden is None:
            return None
        state: dict[str, Tensor] = {}
        for slot in slots:
            if slot.kind != "kv":
                continue
            like = next(iter(slot._shared[0].parameters()))
            key, value = self.keys_values(slot.bind(like))
            state |= {f"{slot.label}.key": key.detach(), f"{slot.label}.value": value.detach()}
        return self.model_copy(update={"hidden": None}), state


def _kind(site: Site) -> str:
    return f"{site.tower}_cross" if site.cross else site.tower
