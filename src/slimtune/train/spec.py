"""TrainSpec: how a delta is trained. The `train:` node of a recipe."""
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimtune.data.metrics import METRICS
from slimtune.errors import RecipeError, listing


class TrainSpec(BaseModel):
    """Length, batches, optimizer, schedule, checkpoints and seed of a run.

    Example:
        >>> TrainSpec(epochs=1, best="macro_f1").schedule
        'linear'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    epochs: float = Field(default=3, gt=0, description="passes over the training data; not used when steps is given")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps, in place of epochs")
    batch_size: int = Field(default=16, ge=1, description="examples of one forward pass in training")
    eval_batch_size: int = Field(default=64, ge=1, description="examples of one forward pass in evaluation")
    gradient_accumulation: int = Field(default=1, ge=1,
        description="forward passes whose gradients one optimizer step joins; each example (or token) weighs the same")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    head_learning_rate: float | None = Field(default=None, gt=0,
        description="peak learning rate of the task head; by default learning_rate")
    weight_decay: float = Field(default=0.0, ge=0,
        description="decoupled weight decay of tensors with two or more axes; biases, norms and scales have none")
    warmup: float = Field(default=0.06, ge=0, lt=1,
        description="share of the steps in which the learning rate rises from 0 to its peak")
    schedule: Literal["linear", "cosine", "constant", "rewinding"] = Field(default="linear",
        description="the learning rate after warm-up: falls to 0 linearly or as a cosine, or stays; rewinding keeps it "
        "at its peak while gradual pruning changes masks, and then falls to 0 linearly")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; null for no clipping")
    optimizer: Literal["adamw"] = Field(default="adamw",
        description="AdamW with betas 0.9 and 0.999, in torch's fused form where the device has it")
    precision: Literal["float32", "bfloat16"] = Field(default="float32",
        description="of the computation: bfloat16 runs under autocast, parameters keep their dtype")
    gradient_checkpointing: bool = Field(default=False,
        description="recompute activations in the backward pass: less memory, about a third more time")
    save_every: int | None = Field(default=None, ge=1,
        description="steps between checkpoints; by default one with each evaluation, or each epoch without "
        "validation data. There is always one at the end, and one at each new best")
    eval_every: int | None = Field(default=None, ge=1,
        description="steps between evaluations on the validation data; by default each epoch. There is always "
        "one at the end")
    log_every: int = Field(default=10, ge=1, description="steps between lines of the training loss")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept; the best one is kept beside them")
    best: str | None = Field(default=None,
        description="validation metric that chooses the checkpoint to end with, such as macro_f1 or loss; null "
        "ends with the last step")
    best_mode: Literal["max", "min"] | None = Field(default=None,
        description="whether more or less of `best` is better; known for loss and slimtune's own metrics")
    patience: int | None = Field(default=None, ge=1,
        description="stop after this many evaluations in a row without a new best; needs best")
    cache: bool | Annotated[str, Field(min_length=1)] = Field(default=False,
        description="compute the hidden states of the frozen part once, and keep them on disk: for heads, side "
        "networks and methods on the last blocks. true keeps them in the run's folder until it is over, a folder for "
        "other runs as well. The frozen part is then without dropout")
    cache_dtype: Literal["model", "bfloat16"] = Field(default="model",
        description="what the cache holds: the model's own numbers, or bfloat16, in half of the room of float32")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the order of the data and of dropout")
    threads: int | None = Field(default=None, ge=1, description="threads of torch during the run; by default as it is")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSpec":
        if self.patience is not None and self.best is None:
            raise ValueError("patience counts evaluations without a new best: give best, the metric it watches")
        if self.best_mode is not None and self.best is None:
            raise ValueError("best_mode says how to compare best: give best, the metric it compares")
        return self


def private_spec(spec: TrainSpec) -> TrainSpec:
    """The spec without what stands against privacy. Errors: RecipeError for what was asked for and cannot be."""
    if spec.gradient_accumulation != 1:
        raise RecipeError(f"train.gradient_accumulation: is {spec.gradient_accumulation}, and a private step draws its "
                          "examples by itself.", "Set privacy.batch_size, the examples of a step; train.batch_size is "
                          "how many run at once.")
    if spec.cache is not False:
        raise RecipeError("train.cache: private training does not use it.", "Leave train.cache out.")
    if spec.clip not in (None, TrainSpec.model_fields["clip"].default):
        raise RecipeError("train.clip: is of a batch's gradient, and private training clips that of each example.",
                          "Set privacy.clip, and leave train.clip out.")
    return spec.model_copy(update={"clip": None})


def more_is_better(spec: TrainSpec) -> bool:
    """Whether more of `best` is better. Errors: RecipeError for a metric that is not known to slimtune."""
    name = (spec.best or "loss").removeprefix("eval_")
    if spec.best_mode is not None:
        return spec.best_mode == "max"
    if name == "loss":
        return False
    if name not in METRICS:
        raise RecipeError(f"train.best: is more or less of '{name}' better?", "Set train.best_mode=max or min.",
                          f"Known are: loss {listing(METRICS)}")
    return METRICS[name].higher
