"""Budget: the units of the highest sum of scores whose costs stay below a share of the whole.

    max sum_i m_i S_i    such that    sum_i m_i c_i <= (1 - s) sum_i c_i

With two kinds of units, heads and neurons, that is exact: for each number of heads the best ones, and as many of the
best neurons as the rest pays for. With more kinds it is greedy by score per cost.

Source: Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.1.
"""
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slimtune.core import Delta
from slimtune.errors import MethodError
from slimtune.sparsity.structure import costs
from slimtune.sparsity.target import Target


class Budget(BaseModel):
    """Prune gates to a share of the multiply-adds, numbers or time that all heads and neurons take together.

    unit: "macs" of `tokens` tokens, "params", or "latency", with the time that one unit of a kind takes, measured by
    you, in `each`: {"attn.heads": 0.21, "mlp.act": 0.0014}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["macs", "params", "latency"] = "macs"
    tokens: int = Field(128, ge=1)
    each: dict[str, float] | None = None

    def costs(self, delta: Delta, gates: Mapping[str, Target]) -> dict[str, float]:
        """The cost of one unit of each gate. Errors: MethodError for a time that is not given."""
        if self.unit != "latency":
            return costs(delta, gates, self.unit, self.tokens)
        roles = {gate.sites[0].role for gate in gates.values()}
        if self.each is None or roles - set(self.each):
            raise MethodError("a budget of latency needs the time of one unit of each kind.",
                              f"Pass each={{{', '.join(f'{r!r}: ...' for r in sorted(roles))}}}, as measured.")
        return {name: self.each[gate.sites[0].role] for name, gate in gates.items()}


def within(scores: Mapping[str, Tensor], cost: Mapping[str, float], sparsity: float) -> dict[str, Tensor]:
    """What is kept of each tensor of units: all that can be paid for, but nothing that scores -inf, as the dead do."""
    values = torch.cat([s.reshape(-1).double().cpu() for s in scores.values()])
    prices = torch.cat([torch.full((s.numel(),), cost[n], dtype=torch.float64) for n, s in scores.items()])
    limit = float(prices.sum()) * (1 - sparsity) * (1 + 1e-12)
    kinds, alive = prices.unique(), values > -torch.inf
    keep = torch.zeros_like(alive)
    keep[alive] = (_two(values[alive], prices[alive], kinds, limit) if len(kinds) <= 2
                   else _greedy(values[alive], prices[alive], limit))
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: part.reshape(s.shape).to(s.device) for (n, s), part in zip(scores.items(), parts, strict=True)}


def _two(values: Tensor, prices: Tensor, kinds: Tensor, limit: float) -> Tensor:
    """Exact: every number of the dearer units, and the best of the cheaper with what is left."""
    dear = (prices == kinds[-1]).nonzero().squeeze(1)
    cheap = (prices != kinds[-1]).nonzero().squeeze(1)
    dear, cheap = (i[values[i].argsort(descending=True, stable=True)] for i in (dear, cheap))
    worth = [torch.cat([torch.zeros(1, dtype=torch.float64), values[i].cumsum(0)]) for i in (dear, cheap)]
    best: tuple[float, int, int] = (-float("inf"), 0, 0)
    for count in range(len(dear) + 1):
        left = limit - count * float(kinds[-1])
        if left < 0:
            break
        most = min(len(cheap), int(left / float(kinds[0]))) if len(cheap) else 0
        best = max(best, (float(worth[0][count] + worth[1][most]), count, most))
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[dear[: best[1]]] = True
    keep[cheap[: best[2]]] = True
    return keep


def _greedy(values: Tensor, prices: Tensor, limit: float) -> Tensor:
    keep, spent = torch.zeros(len(values), dtype=torch.bool), 0.0
    for i in (values / prices).argsort(descending=True, stable=True).tolist():
        if spent + float(prices[i]) <= limit:
            keep[i], spent = True, spent + float(prices[i])
    return keep
