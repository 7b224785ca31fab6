"""The budget of the vision benchmark, its four sets, and each method's sizes and rate."""
from dataclasses import dataclass, field
from typing import Any

from slimtune.io.dinov2 import NAME
from slimtune.train import TrainSpec

MODEL, SIZE, TRAIN, TEST, HELD_OUT = NAME, 56, 1000, 500, 0.2
SEEDS = (0, 1, 2)
HEAD_RATE = 3e-3
BUDGET = TrainSpec(epochs=3, batch_size=16, weight_decay=0.01, warmup=0.1, schedule="cosine", precision="bfloat16",
                   head_learning_rate=HEAD_RATE, save_every=10**6, threads=1)
SETS: dict[str, dict[str, Any]] = {
    "cifar10": {"train": "cifar10/train_10k.zip", "test": "cifar10/test.zip", "test_size": TEST},
    "dtd10": {"train": "dtd10/images_160px.zip", "test_fraction": 1 / 6},
    "sign_digits": {"train": "sign_digits/images.zip", "test_fraction": 0.4, "test_size": TEST},
    "fashion_mnist": {"train": "fashion_mnist/train10k-images-idx3-ubyte.gz",
                      "test": "fashion_mnist/t10k-images-idx3-ubyte.gz", "test_size": TEST},
}
"""Ten classes each. The sets that come in one file are split anew with every seed, a sixth or two fifths for test."""
ABOUT = {"cifar10": "natural images", "dtd10": "textures", "sign_digits": "hand signs", "fashion_mnist": "clothes"}


@dataclass(frozen=True)
class Setting:
    """How a method is trained: the rate of what it trains beside the head, the head's, and epochs, if not three."""

    method: str
    rate: float
    values: dict[str, Any] = field(default_factory=dict)
    head: float = HEAD_RATE
    epochs: float = BUDGET.epochs
    cache: bool = False


SETTINGS: dict[str, Setting] = {
    "linear": Setting("linear_probe", 1e-3, head=1e-3, epochs=20, cache=True),
    "bias": Setting("bitfit", 1e-3),
    "adapter": Setting("pfeiffer", 3e-3, {"bottleneck": 48}),
    "LoRA": Setting("lora", 3e-3, {"rank": 8}),
    "FacT-TT": Setting("fact", 3e-3, {"form": "tt", "rank": 16}),
    "VPT-shallow": Setting("vpt", 1e-2, {"length": 10, "deep": False}),
    "VPT-deep": Setting("vpt", 3e-3, {"length": 10, "deep": True}),
    "full": Setting("full", 3e-5),
}
