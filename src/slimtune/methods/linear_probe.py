"""Linear probe: the task head on frozen features.

    logits = W h(x) + b,    h frozen

Source: the baseline of every paper here; Alain and Bengio, 2016, "Understanding intermediate layers using linear
classifier probes", arXiv 1610.01644.
"""
from slimtune.core import Builder, Unfreeze


class LinearProbe(Unfreeze):
    """Trains the head alone; the backbone keeps no graph."""

    def tensors(self, build: Builder) -> list[str]:
        return []
