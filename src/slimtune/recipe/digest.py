"""A digest of predictions: what proves that a saved delta predicts, in any process, what the trained one did."""
import hashlib
from typing import Any

import torch
from torch import Tensor

from slimtune.data.examples import Prepared
from slimtune.train import Predictions

EXAMPLES = 512


def judged(data: Prepared) -> tuple[str, Any]:
    """The split whose predictions are digested: test, else validation, else the first examples of train."""
    for name in ("test", "validation"):
        if (split := getattr(data, name)) is not None:
            return name, split
    assert data.train is not None
    return "train", data.train.plain(EXAMPLES)


def digest(found: Predictions) -> str:
    """SHA-256 of predictions, bit for bit.

    Example:
        >>> digest(Predictions(["yes"], None, None))[:8]
        '8a798890'
    """
    values = found.predictions
    if isinstance(values, Tensor):
        return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashlib.sha256("\x00".join(map(str, values)).encode()).hexdigest()
