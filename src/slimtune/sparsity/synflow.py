"""SynFlow: how much flows through a weight, without any data.

    R = 1^T |W_k| ... |W_1| 1,    S = |W * dR/dW|

over each chain of matrices, whose scores add up to R in every one of its matrices. A Transformer is no chain: norms,
softmax and residual sums stand between its maps, and one all-ones input gives R = 0 behind a norm. As SparseAdapter's
code does with adapters, each stretch without any of these is a chain of its own, and R is the sum over the chains:

    delta      |down|, |up| of an adapter; |A|, |B| of a LoRA; the matrices of one site, each feeding the next
    backbone   feed-forward network   1^T |W_down| (|W_up| 1  *  |W_gate| 1, where there is a gate)
               values and output      1^T |W_o| |W_v| 1
               scores of attention    sum over heads (|W_q| 1)^T (|W_k| 1)
               a map beside these     1^T |W| 1, its score being |W|

Single shot, it starves layers; the paper prunes in 100 rounds, a share rho^(k / 100) living after round k.

Source: Tanaka et al., 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow", arXiv
2006.05467, equations 2 and 3, algorithm 1; on adapters, He et al., 2022, "SparseAdapter", arXiv 2210.04284, its code.
"""
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from slimtune.core.sites import LINEAR, Site
from slimtune.errors import MethodError
from slimtune.sparsity.criterion import Criterion, criterion
from slimtune.sparsity.gradients import wide
from slimtune.sparsity.structure import at_site
from slimtune.sparsity.target import oriented
from slimtune.sparsity.view import View

Leaves = dict[str, Tensor]


@criterion
class SynFlow(Criterion):
    """The weight times the gradient of the flow through the absolute weights of its chain.

    Errors: MethodError for matrices of one site that do not feed one another, as Kronecker factors.

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.methods import Pfeiffer
        >>> from slimtune.sparsity.target import targets
        >>> from slimtune.testing import tiny
        >>> delta = attach(tiny("bert"), Pfeiffer(bottleneck=4))
        >>> down, up, *_ = SynFlow().score(View(delta, targets(delta))).values()
        >>> bool(torch.isclose(down.sum(), up.sum()))
        True
    """

    def score(self, view: View) -> dict[str, Tensor]:
        leaves = {name: wide(w).abs().requires_grad_() for name, w in view.weights.items()}
        with torch.enable_grad():
            flows = [*_of_delta(view, leaves), *_of_backbone(view, leaves)]
            found = torch.autograd.grad(torch.stack(flows).sum(), list(leaves.values()))
        return {name: (leaf * g).detach() for (name, leaf), g in zip(leaves.items(), found, strict=True)}


def flow(chain: Sequence[Tensor]) -> Tensor:
    """1^T W_k ... W_1 1. Shapes: W_1 (d_1, d_in), W_2 (d_2, d_1), ...; a scalar."""
    x = chain[0].sum(1)
    for weight in chain[1:]:
        x = weight @ x
    return x.sum()


def _of_delta(view: View, leaves: Leaves) -> list[Tensor]:
    chains: dict[str, list[tuple[str, Tensor]]] = {}
    for name, target in view.targets.items():
        if target.module is None and not name.startswith("own."):
            chains.setdefault(name.rpartition(".")[0], []).append((name, leaves[name]))
    for chain in chains.values():
        shapes = [tuple(w.shape) for _, w in chain]
        if any(len(s) != 2 for s in shapes) or any(b[1] != a[0] for a, b in pairwise(shapes)):
            raise MethodError(f"SynFlow: {', '.join(f'{n} {tuple(w.shape)}' for n, w in chain)} are no chain of "
                              "matrices in which each feeds the next.", "Choose 'magnitude', 'snip' or 'grasp'.")
    return [flow([w for _, w in chain]) for chain in chains.values()]


def _of_backbone(view: View, leaves: Leaves) -> list[Tensor]:
    targets = {name: t for name, t in view.targets.items() if t.module is not None}
    chosen = {(s.tower, s.block, s.cross) for t in targets.values() for s in t.sites}
    blocks: dict[tuple[str, int | None, bool], Leaves] = {key: {} for key in chosen}
    heads = dict.fromkeys(chosen, 1)
    for site in view.delta.anatomy.sites:
        key = (site.tower, site.block, site.cross)
        if key in chosen and site.role in LINEAR:
            blocks[key][site.role] = _absolute(view, site, leaves)
        elif key in chosen and site.role == "attn.heads":
            heads[key] = site.head_dim
    flows = [f for key, block in blocks.items() for f in _of_block(block, heads[key])]
    return flows + [flow([oriented(leaves[name], t)]) for name, t in targets.items() if not t.sites]


def _of_block(weights: Leaves, head: int) -> list[Tensor]:
    """The flow of each chain of a block. head: the width of one."""
    flows = []
    if {"mlp.up", "mlp.down"} <= set(weights):
        inner = weights.pop("mlp.up").sum(1)
        if "mlp.gate" in weights:
            inner = inner * weights.pop("mlp.gate").sum(1)
        flows.append((weights.pop("mlp.down") @ inner).sum())
    if {"attn.v", "attn.o"} <= set(weights):
        out = weights.pop("attn.o")
        flows.append((out @ _repeated(weights.pop("attn.v").sum(1), out.shape[1], head)).sum())
    if {"attn.q", "attn.k"} <= set(weights):
        query = weights.pop("attn.q").sum(1)
        flows.append((query * _repeated(weights.pop("attn.k").sum(1), len(query), head)).sum())
    return flows + [flow([w]) for w in weights.values()]


def _repeated(x: Tensor, width: int, head: int) -> Tensor:
    """Keys or values of heads that several queries share, once for each of them."""
    return x if len(x) == width else x.reshape(-1, head).repeat_interleave(width // len(x), 0).flatten()


def _absolute(view: View, site: Site, leaves: Leaves) -> Tensor:
    """|W| of a site, (d_out, d_in): the leaf where it may be pruned, else a constant."""
    name = f"own.{site.path}.weight"
    weight = leaves[name] if name in leaves else wide(
        view.model.get_submodule(site.path)._parameters["weight"].detach()).abs()  # type: ignore[union-attr]
    return at_site(weight, site)
