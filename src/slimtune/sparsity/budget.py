"""Budget: the units of the highest sum of scores whose costs stay below a share of the whole.

    max sum_i m_i S_i    such that    sum_i m_i c_i <= (1 - s) sum_i c_i

With two kinds of units, heads and neurons, that is exact: for each number of heads the best ones, and as many of the
best neurons as the rest pays for. With more kinds it is greedy by score per cost.

Where a layer keeps a multiple of N neurons, its best N are one unit of N times the cost, the next N another, and so
on; a later one never scores more, so the best of them all is again exact.

Where some S are below 0, as movement's are, S - min S stands for S: a budget keeps all that it can pay for.

Source: Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.1.
"""
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slimtune.core import Delta
from slimtune.errors import MethodError
from slimtune.sparsity.structure import costs
from slimtune.sparsity.target import Target


class Budget(BaseModel):
    """Prune gates to a share of the multiply-adds, numbers or time that all heads and neurons take together.

    unit: "macs" of `tokens` tokens, "params", or "latency", with the time that one unit of a kind takes in `each`, as
    slimtune.compress.unit_times measures it: {"attn.heads": 0.21, "mlp.act": 0.0014}.
    multiple: each layer keeps a number of neurons that this divides, 0 among them; dense kernels like 8 and 16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["macs", "params", "latency"] = "macs"
    tokens: int = Field(default=128, ge=1)
    each: dict[str, Annotated[float, Field(gt=0)]] | None = None
    multiple: int = Field(default=1, ge=1)

    def costs(self, delta: Delta, gates: Mapping[str, Target]) -> dict[str, float]:
        """The cost of one unit of each gate. Errors: MethodError for a time that is not given."""
        if self.unit != "latency":
            return costs(delta, gates, self.unit, self.tokens)
        roles = {gate.sites[0].role for gate in gates.values()}
        if self.each is None or roles - set(self.each):
            asked = ", ".join(f"{role!r}: ..." for role in sorted(roles))
            raise MethodError("a budget of latency needs the time of one unit of each kind.",
                              f"Pass each={{{asked}}}, as slimtune.compress.unit_times measures it.")
        return {name: self.each[gate.sites[0].role] for name, gate in gates.items()}

    def multiples(self, gates: Mapping[str, Target]) -> dict[str, int]:
        """What divides the number of units that is kept of each gate. Errors: MethodError for more than there are."""
        found = {name: self.multiple if gate.sites[0].role == "mlp.act" else 1 for name, gate in gates.items()}
        if small := [name for name, n in found.items() if n > gates[name].parameter.numel()]:
            raise MethodError(f"a budget keeps a multiple of {self.multiple} neurons a layer, and {small[0]} has "
                              f"{gates[small[0]].parameter.numel()}.", "Set allocation.multiple to fewer.")
        return found


def within(scores: Mapping[str, Tensor], cost: Mapping[str, float], sparsity: float,
           multiple: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """What is kept of each tensor of units: all that can be paid for, but nothing that scores -inf, as the dead do.

    multiple: of each tensor, what divides the number that is kept; 1 where nothing is said.
    """
    limit = sum(s.numel() * cost[n] for n, s in scores.items()) * (1 - sparsity) * (1 + 1e-12)
    bunches, values = {}, {}
    below = min([0.0, *(float(s[s > -torch.inf].min()) for s in scores.values() if bool((s > -torch.inf).any()))])
    for name, score in scores.items():
        flat = score.reshape(-1).double().cpu() - below
        order = flat.argsort(descending=True, stable=True)[:int((flat > -torch.inf).sum())]
        size = (multiple or {}).get(name, 1)
        bunches[name] = order[:len(order) // size * size].reshape(-1, size)
        values[name] = flat[bunches[name]].sum(1)
    prices = {n: torch.full((len(b),), cost[n] * b.shape[1], dtype=torch.float64) for n, b in bunches.items()}
    every, price = torch.cat(list(values.values())), torch.cat(list(prices.values()))
    kinds = torch.tensor([cost[n] * b.shape[1] for n, b in bunches.items()], dtype=torch.float64).unique()
    kept = _two(every, price, kinds, limit) if len(kinds) <= 2 else _greedy(every, price, limit)
    keep = {}
    for (name, score), part in zip(scores.items(), kept.split([len(b) for b in bunches.values()]), strict=True):
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[bunches[name][:int(part.sum())].flatten()] = True
        keep[name] = mask.reshape(score.shape).to(score.device)
    return keep


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
