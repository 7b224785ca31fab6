"""Compiled models while a route is open: they run as they are written.

A graph that `torch.compile` made holds for whoever calls it, and cannot ask which thread that is. So while any route
is open compiled functions run eagerly, by torch's own stance, and afterwards they are what they were.
"""
import sys
from typing import Any

import torch


class Eager:
    """How many routes are open, and the stance that is given back when the last one closes."""

    def __init__(self) -> None:
        self.open = 0
        self.stance: Any = None

    def begin(self) -> None:
        """A route opens; to be called under the lock."""
        if self.stance is None and "torch._dynamo" in sys.modules:  # else nothing is compiled; its import takes seconds
            self.stance = torch.compiler.set_stance("force_eager")
        self.open += 1

    def end(self) -> None:
        """A route closes."""
        self.open -= 1
        if not self.open and self.stance is not None:
            self.stance.__exit__(None, None, None)
            self.stance = None


EAGER = Eager()
