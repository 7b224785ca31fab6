"""Public helpers for tests: tiny backbones, the conformance suite, fault injection."""
from slimtune.testing.tiny import NAMES, batch, kind, loss, output, tiny

__all__ = ["NAMES", "batch", "kind", "loss", "output", "tiny"]
