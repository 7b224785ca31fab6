"""AdapterFusion: the outputs of several frozen adapters, mixed by attention.

    z_t = f_t(u),    y <- y + sum_t softmax_t(Q(u) . K(z_t)) V(z_t)

Behind a post-norm sum the mixture stands where a Pfeiffer adapter's output does.

Source: Pfeiffer et al., 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv
2005.00247, section 3.2.
"""
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, einsum, nn
from torch.nn.functional import pad

from slimtune.core import (
    ACTIVATIONS,
    Anatomy,
    BehindNorm,
    Bound,
    Delta,
    Init,
    Params,
    Site,
    Slot,
    affine,
    attach,
    deltas,
    normal,
    zeros,
)
from slimtune.errors import DeltaError, MethodError, listing, suggest


class AdapterFusion(BehindNorm):
    """Trains the attention, 3 d^2 + 2 d numbers a block: 21,252,096 on BERT-base; the adapters stay frozen in it.

    `AdapterFusion.of(model, names)` takes the adapters of attached deltas; attached by itself it mixes random ones.

    Shapes:
        u, y: (..., T, d); down: (N, m, d) and up: (N, d, m), the N adapters.
    """

    bottleneck: int = Field(48, ge=1, description="m")
    adapters: int = Field(2, ge=1, description="N, the adapters that are mixed")
    regularization: float = Field(0.01, ge=0.0, description="times |I - V|^2, added to the loss")

    silent: ClassVar[dict[str, str]] = {
        r"\.key_bias$": "one shift of all keys changes no share",
        r"\.(query|query_bias|key)$": "its gradient goes with the square of the adapters' outputs, nearly 0 at random"}

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], name: str = "fusion", **values: object) -> Delta:
        """A fusion of attached deltas of one Pfeiffer adapter each, as a delta of its own.

        Narrower adapters are filled up with units that are always 0. Errors: DeltaError for an unknown name;
        MethodError for a delta of another method, or adapters of other settings.
        """
        parts = [_adapter(model, n) for n in names]
        lead = parts[0].methods[0]
        width = max(d.methods[0].bottleneck for d in parts)  # type: ignore[attr-defined]
        shared = {k: getattr(lead, k) for k in ("activation", "sites", "blocks", "scale")}
        for d in parts[1:]:
            for key, value in shared.items():
                if getattr(d.methods[0], key) != value:
                    raise MethodError(f"deltas '{names[0]}' and '{d.name}' differ in {key}: {value} and "
                                      f"{getattr(d.methods[0], key)}.", "Fuse adapters of the same settings.")
        fused = attach(model, cls(bottleneck=width, adapters=len(parts), **{**shared, **values}), name)  # type: ignore[arg-type]
        tensors = fused.tensors()
        states = [d.state() for d in parts]
        with torch.no_grad():
            for key, target in tensors.items():
                stem, _, last = key.rpartition(".")
                if last in ("down", "down_bias", "up", "up_bias"):
                    source = f"{stem.rpartition('.')[0]}.pfeiffer.{last}"
                    target.copy_(torch.stack([_fill(s[source], target.shape[1:]) for s in states]))
        return fused

    def where(self, anatomy: Anatomy) -> list[Site]:
        if self.layer_norm != "none" or self.learned_scale or self.form != "sequential":
            raise MethodError("AdapterFusion mixes plain sequential adapters.",
                              "Leave layer_norm, learned_scale and form as they are.")
        return super().where(anatomy)

    def params(self, site: Site) -> Params:
        d, m, n = site.d_out, self.bottleneck, self.adapters
        frozen = {"down": normal(n, m, d), "down_bias": zeros(n, m), "up": normal(n, d, m), "up_bias": zeros(n, d)}
        kept = {k: Init(i.shape, i.fill, trainable=False) for k, i in frozen.items()}
        return {**kept, "query": normal(d, d), "query_bias": zeros(d), "key": normal(d, d), "key_bias": zeros(d),
                "value": Init((d, d), _nearly_identity)}

    def update(self, p: Bound, u: Tensor) -> Tensor:
        h = affine(u, p["down"].flatten(-3, -2), p["down_bias"].flatten(-2))
        h = ACTIVATIONS[self.activation](h).unflatten(-1, (self.adapters, -1))
        if self.dropout and p.training:
            h = F.dropout(h, self.dropout)
        example = "b" if p["up"].dim() == 4 else ""
        bias = p["up_bias"] if not example else p["up_bias"].view(-1, *[1] * (u.dim() - 2), *p["up_bias"].shape[1:])
        z = self.scale * (einsum(f"b...nm,{example}ndm->b...nd", h, p["up"]) + bias)
        query, key = affine(u, p["query"], p["query_bias"]), affine(z, p["key"], p["key_bias"])
        share = (key * query[..., None, :]).sum(-1).softmax(-1)
        return (share[..., None] * affine(z, p["value"])).sum(-2)

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        if not self.regularization:
            return None
        values = [slot._parameters["value"] for slot in slots]
        return self.regularization * torch.stack(
            [(torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) - v).square().sum()
             for v in values if v is not None]).sum()


def _nearly_identity(t: Tensor, generator: torch.Generator) -> None:
    t.fill_(1e-6).fill_diagonal_(1.0)


def _adapter(model: nn.Module, name: str) -> Delta:
    found = deltas(model)
    if name not in found:
        raise DeltaError(f"no delta named '{name}' is attached.", f"There are: {listing(found) or 'none'}",
                         suggest(name, found))
    delta = found[name]
    kinds = [type(m).__name__ for m in delta.methods]
    if kinds != ["Pfeiffer"]:
        raise MethodError(f"delta '{name}' is {' + '.join(kinds)}; AdapterFusion mixes Pfeiffer adapters.",
                          "Train the tasks with Pfeiffer.")
    return delta


def _fill(value: Tensor, shape: torch.Size) -> Tensor:
    """The value with zeros up to the shape."""
    widths = [w for have, want in zip(reversed(value.shape), reversed(shape), strict=True) for w in (0, want - have)]
    return pad(value, widths)
