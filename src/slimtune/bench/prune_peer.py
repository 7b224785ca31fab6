"""The same share of multiply-adds pruned by Torch-Pruning, as its users do it: groups by magnitude, heads whole."""
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimtune.core import dissect
from slimtune.errors import SlimtuneError
from slimtune.sparsity.macs import count_macs

RATIOS = 40
"""Ratios are tried in steps of one of so many."""


def torch_pruning(model: nn.Module, level: float, batch: Mapping[str, Any], tokens: int) -> nn.Module:
    """Heads and neurons pruned to at most 1 - level of the multiply-adds, by the ratio that first reaches it.

    Hidden dimensions are left alone, so that the two prune the same things. Errors: ImportError without the package;
    SlimtuneError when no ratio below 1 reaches it.
    """
    most = (1 - level) * count_macs(model, tokens=tokens).total
    for step in range(1, RATIOS):
        small = _at(model, step / RATIOS, batch)
        if count_macs(small, tokens=tokens).total <= most:
            return small
    raise SlimtuneError(f"Torch-Pruning reached no {level:.0%} of the multiply-adds at any ratio below 1.",
                        "Ask for a smaller share.")


def _at(model: nn.Module, ratio: float, batch: Mapping[str, Any]) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model).eval()
    anatomy = dissect(small)
    at = {site.path: site for site in anatomy.sites}
    kinds = nn.Linear | nn.Embedding | nn.LayerNorm
    keep: list[nn.Module] = [m for path, m in small.named_modules() if isinstance(m, kinds) and (
        path not in at or at[path].role in ("attn.o", "mlp.down"))]
    heads = {small.get_submodule(s.path): s.d_out // _width(anatomy, s) for s in anatomy.sites
             if s.role in ("attn.q", "attn.k", "attn.v")}
    inputs: Any = {key: value for key, value in batch.items() if key != "labels"}
    for p in small.parameters():
        p.requires_grad_(True)
    pruner = tp.pruner.BasePruner(
        small, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
        ignored_layers=keep, num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio,
        output_transform=lambda out: out.logits.sum())
    pruner.step()
    _settle(small, pruner)
    with torch.no_grad():
        small(**inputs)
    return small


def _width(anatomy: Any, site: Any) -> int:
    return next(s.head_dim for s in anatomy.sites if s.role == "attn.heads" and s.block == site.block)


def _settle(model: Any, pruner: Any) -> None:
    """The head counts that BERT's attention keeps, which Torch-Pruning leaves to its users."""
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.num_attention_heads = pruner.num_heads[module.query]
            module.all_head_size = module.query.out_features
