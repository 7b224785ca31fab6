"""Deltas that do something, for tests of several of them on one model."""
import torch
from torch import nn

from slimtune.core import Delta, Method, attach


def moved(model: nn.Module, method: Method | list[Method], name: str, seed: int = 0) -> Delta:
    """A delta whose values were moved from where they start by N(0, 0.1^2)."""
    delta = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)
    return delta
