"""The budget of the learning test, the same for all, and each method's sizes and rate."""
from dataclasses import dataclass, field
from typing import Any

from slimtune.train import TrainSpec

TOKENS, HELD_OUT, HEAD_RATE = 40, 0.3, 1e-2
GRID = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
BUDGET = TrainSpec(epochs=4, save_every=1000, batch_size=16, weight_decay=0.01, warmup=0.1, precision="bfloat16",
                   head_learning_rate=HEAD_RATE, seed=0, threads=1)
PROBES = ("linear_probe", "linear_probe+pooler")
"""The head alone, and with the pooler."""


@dataclass(frozen=True)
class Setting:
    """How a method is trained here.

    rate: of what it trains beside the pooler and head. head: their rate. values: sizes that suit a small encoder;
    the pooler is trained, if they do not say otherwise. why: the reason, where it does not beat the better probe.
    """

    rate: float
    values: dict[str, Any] = field(default_factory=dict)
    head: float = HEAD_RATE
    why: str = ""


SETTINGS: dict[str, Setting] = {
    "linear_probe": Setting(3e-2, {"pooler": False}, head=3e-2),
    "linear_probe+pooler": Setting(HEAD_RATE),
    "adapter_drop": Setting(3e-3, {"drop": 3}),
    "adapter_fusion": Setting(3e-4),
    "adapterbias": Setting(1e-2),
    "adaptformer": Setting(1e-2),
    "added_bias": Setting(3e-3,
                          why="as bitfit, which on a model with biases is the same update."),
    "bitfit": Setting(3e-3,
                      why="its training loss is well below the pooled probe's, its macro-F1 is not above it."),
    "bottleneck_adapter": Setting(3e-3),
    "compacter": Setting(3e-3),
    "compacter_plus_plus": Setting(1e-2),
    "convpass": Setting(1e-3, why="goes on images: text has no patches to convolve, so this encoder refuses it."),
    "dora": Setting(3e-3),
    "dsee": Setting(3e-3),
    "fact": Setting(3e-3),
    "full": Setting(1e-4, head=1e-4),
    "gates": Setting(3e-2),
    "houlsby": Setting(3e-3),
    "ia3": Setting(3e-2),
    "intrinsic_dimension": Setting(3e-3),
    "kadaptation": Setting(3e-3),
    "loha": Setting(1e-2),
    "lokr": Setting(1e-2),
    "lora": Setting(3e-3),
    "low_rank_adapter": Setting(3e-3),
    "lst": Setting(1e-3, head=3e-3),
    "mam": Setting(3e-3, {"length": 10, "bottleneck": 64}),
    "mlp_head": Setting(1e-3),
    "multi_head_parallel_adapter": Setting(1e-2),
    "norm_tuning": Setting(3e-3),
    "p_tuning_v2": Setting(3e-2, {"length": 10}),
    "parallel_adapter": Setting(3e-3),
    "partial_k": Setting(3e-4),
    "pfeiffer": Setting(3e-3),
    "phm_adapter": Setting(3e-3),
    "prefix_tuning": Setting(3e-2, {"length": 10}),
    "prompt_tuning": Setting(1e-2, {"length": 20},
                             why="few numbers, far from the head; more steps were not measured here."),
    "repadapter": Setting(1e-3, why="goes between a norm and what reads it, in pre-norm blocks; this encoder is "
                          "post-norm and refuses it."),
    "scaled_parallel_adapter": Setting(1e-3, {"bottleneck": 64}),
    "side_tuning": Setting(3e-3, head=3e-3,
                           why="its two small side blocks replace half of the features at the start."),
    "ssf": Setting(1e-3),
    "tarp": Setting(1e-3),
    "vpt": Setting(1e-3, why="goes on images: this encoder has no vision tower and refuses it."),
}
