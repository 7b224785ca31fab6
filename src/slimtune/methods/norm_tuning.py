"""Norm tuning: the scales and shifts of the normalisation layers.

    y = gamma * normalise(x) + beta,    gamma and beta trained

Source: Zhao et al., 2023, "Tuning LayerNorm in Attention", arXiv 2312.11420, section 3.
"""
from slimtune.core import Builder, Unfreeze


class NormTuning(Unfreeze):
    """Trains every norm of the blocks and towers: 38,400 numbers on BERT-base."""

    sites: tuple[str, ...] = ("norm.*",)

    def tensors(self, build: Builder) -> list[str]:
        found = build.anatomy.select(self.sites, self.blocks, who="method NormTuning")
        return [f"{site.path}.{name}" for site in found
                for name, _ in build.module(site.path).named_parameters(recurse=False)]
