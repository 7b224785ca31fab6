"""PruneSpec: what is pruned in a run, by which criterion, and when."""
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from slimtune.sparsity.allocation import Rule, Ties
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.criterion import Criterion, as_criterion, criterion_config
from slimtune.sparsity.granularity import NM, Granularity, as_granularity
from slimtune.sparsity.schedule import SRSTE, Cubic, OneShot, Schedule
from slimtune.sparsity.target import On
from slimtune.sparsity.threshold import Threshold


def _kind(given: Any) -> str:
    """Which of the allocations is meant, so that errors are of that one."""
    if isinstance(given, Threshold) or (isinstance(given, dict) and set(given) & set(Threshold.model_fields)):
        return "threshold"
    return "budget" if isinstance(given, Budget | dict) else "name"


Allocation: TypeAlias = Annotated[Annotated[str, Tag("name")] | Annotated[Budget, Tag("budget")]
                                  | Annotated[Threshold, Tag("threshold")], Discriminator(_kind)]

class PruneSpec(BaseModel):
    """The arguments of `prune`, a schedule, and how many training examples a criterion may see.

    Example:
        >>> PruneSpec(sparsity=0.5, schedule="cubic").schedule.end
        0.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    sparsity: float | None = Field(default=None, ge=0, lt=1,
        description="the share of the weights that is 0 in the end; of n:m or a threshold it follows, and is not given")
    criterion: dict[str, Any] = Field(default={"name": "magnitude"},
        description="which weights matter: a name, or a name and its settings")
    on: On = Field(default="delta",
        description="prune the delta, the base below it, both, gates of heads and neurons, or hidden, the gates of "
        "the residual stream's dimensions")
    allocation: Allocation | None = Field(default=None,
        description="how much of each tensor: uniform, global, row, er, erk, a budget, or for soft movement a "
        "threshold such as {tau: 0.1}; by default the criterion's")
    granularity: dict[str, Any] = Field(default={"name": "element"},
        description="what lives or dies together: element, block, row, column, whole, layer, rank, or n:m such as 2:4")
    by: Literal["own", "weights"] = Field(default="own",
        description="gates are scored by themselves, or by the weights that go with them")
    sites: tuple[str, ...] = Field(default=("linear",), description="linear maps of the base that may be pruned")
    blocks: tuple[int, ...] | None = Field(default=None, description="blocks of the base; all by default")
    pooler: bool = Field(default=False, description="prune the base's pooler as well")
    ties: Ties = Field(default="exact", description="of equal scores the first go, or all that tie with the last to go")
    rule: Rule = Field(default="floor", description="how the number of weights that go is made whole")
    schedule: Schedule = Field(default=OneShot(), description="one_shot before the first step, cubic or sr_ste")
    examples: int = Field(default=320, ge=1, description="training examples that a criterion sees each time it scores")

    @field_validator("criterion", mode="before")
    @classmethod
    def _criterion(cls, given: Any) -> dict[str, Any]:
        return criterion_config(as_criterion(given)) if isinstance(given, Criterion | str | dict) else given

    @field_validator("granularity", mode="before")
    @classmethod
    def _granularity(cls, given: Any) -> Any:
        if not isinstance(given, Granularity | str | dict):
            return given
        made = as_granularity(given)
        return {"name": type(made).__name__.lower(), **made.model_dump(mode="json")}

    @field_validator("schedule", mode="before")
    @classmethod
    def _schedule(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _together(self) -> "PruneSpec":
        rule, name, when = self.rule_of, type(self.rule_of).__name__, self.schedule
        if rule.observes and not isinstance(when, Cubic):
            raise ValueError(f"{name} learns its scores while the weights train: give a cubic schedule")
        if rule.changes and not isinstance(when, OneShot) and when.reenter:
            raise ValueError(f"{name} moves what lives to make up for what goes, which then cannot come back: prune in "
                             "one shot, or by a cubic schedule with reenter=false")
        if isinstance(self.allocation, Threshold) and not isinstance(when, Cubic):
            raise ValueError("a threshold rises while the scores are learned: give a cubic schedule")
        if self.final is None and isinstance(when, SRSTE):
            raise ValueError("give a granularity n:m such as 2:4, or the sparsity that sr_ste holds")
        rises = isinstance(when, Cubic) or (isinstance(when, OneShot) and when.rounds > 1)
        if self.sparsity is None and rises and not isinstance(self.allocation, Threshold):
            raise ValueError("give sparsity, which the schedule rises to; n:m is pruned in one shot, or by sr_ste")
        return self

    @property
    def rule_of(self) -> Criterion:
        """The criterion itself."""
        return as_criterion(self.criterion)

    @property
    def final(self) -> float | None:
        """What a schedule rises to: tau, or the sparsity, given or that of n:m."""
        units = as_granularity(self.granularity)
        if isinstance(self.allocation, Threshold):
            return self.allocation.tau
        return 1 - units.n / units.m if isinstance(units, NM) else self.sparsity

    def at(self, value: float) -> dict[str, Any]:
        """What `prune` takes when the schedule is at a value, but for the data."""
        given = {**self.arguments(), "sparsity": None if self.sparsity is None else value}
        return {**given, "allocation": self.allocation.at(value)} if isinstance(self.allocation, Threshold) else given

    def arguments(self) -> dict[str, Any]:
        """What `prune` takes, but for the sparsity and the data."""
        return {name: getattr(self, name) for name in ("criterion", "on", "allocation", "granularity", "by", "sites",
                                                       "blocks", "pooler", "ties", "rule")}
