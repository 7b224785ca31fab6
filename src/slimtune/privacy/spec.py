"""PrivacySpec: what a private run promises and how. The `privacy:` node of a recipe."""
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PrivacySpec(BaseModel):
    """(epsilon, delta)-differential privacy of the training examples, by DP-SGD on everything the delta trains.

    Two data sets are neighbours when one has an example more. Source: Abadi et al., 2016, "Deep Learning with
    Differential Privacy", arXiv 1607.00133, Algorithm 1; Yu et al., 2022, "Differentially Private Fine-tuning of
    Language Models", arXiv 2110.06500.

    Example:
        >>> PrivacySpec(epsilon=8, delta=1e-5).clipping
        'flat'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    epsilon: float | None = Field(default=None, gt=0,
        description="the most that the whole run may spend; the noise is chosen for it")
    delta: float = Field(gt=0, lt=1, description="probability outside of epsilon's bound: below 1 / examples")
    noise_multiplier: float | None = Field(default=None, ge=0,
        description="sigma, the noise's deviation over clip, in place of epsilon or beside it, which it then must keep")
    clip: float = Field(default=1.0, gt=0, description="largest norm of an example's gradient; the first, if adaptive")
    clipping: Literal["flat", "per_layer", "automatic", "adaptive"] = Field(default="flat",
        description="flat: the norm over all tensors is cut to clip; per_layer: that of each of n tensors to "
        "clip/sqrt(n); automatic: clip/(norm + 0.01) times the gradient; adaptive: clip follows a quantile of norms")
    batch_size: int | None = Field(default=None, ge=1,
        description="examples that one step is expected to draw, by default train.batch_size; train.batch_size is how "
        "many run at once, and changes no result")
    accountant: Literal["prv", "rdp"] = Field(default="prv",
        description="how epsilon is counted: numerically (prv, a tight upper bound) or by Renyi divergences")
    secure: bool = Field(default=False,
        description="sum four draws for each noise, against attacks that read its floating-point pattern")
    seed: int | None = Field(default=None, ge=0, lt=2**63,
        description="of sampling and noise, for tests: whoever knows it can take the noise off. By default the "
        "operating system draws it, and only the checkpoints hold it")
    quantile: float = Field(default=0.5, gt=0, lt=1, description="share of examples not clipped, for adaptive")
    clip_rate: float = Field(default=0.2, gt=0, description="learning rate of the clip, for adaptive")
    count_noise: float | None = Field(default=None, gt=0,
        description="noise's deviation on the count of examples not clipped, for adaptive; by default batch_size / 20")

    @model_validator(mode="after")
    def _consistent(self) -> "PrivacySpec":
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give epsilon, what may be spent, or noise_multiplier")
        only = [key for key in ("quantile", "clip_rate", "count_noise")
                if getattr(self, key) != type(self).model_fields[key].default]
        if only and self.clipping != "adaptive":
            raise ValueError(f"{only[0]} is for clipping=adaptive, not for {self.clipping}")
        return self
