"""Recipe: one validated tree that describes one run. YAML is only its text form."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_json

from slimtune.data import DataSpec
from slimtune.errors import MethodError, RecipeError, listing
from slimtune.methods import Method, get, names, to_config
from slimtune.objectives.distillation import Distillation
from slimtune.privacy.spec import PrivacySpec
from slimtune.recipe.document import Document
from slimtune.recipe.explain import explain
from slimtune.train.prunespec import PruneSpec
from slimtune.train.spec import TrainSpec, private_spec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _as_list(value: object) -> object:
    """One method is a union of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_method(value: object, info: ValidationInfo) -> object:
    """A method from its mapping, checked by its own model so that errors name the key."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    values = dict(value)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise MethodError("a method needs a name", f"There are: {listing(names())}")
    cls = get(name)
    blank = cls.__new__(cls)  # validated as its __init__ would, but with pydantic's own error
    check = cls.__pydantic_validator__
    if info.mode == "json":
        return check.validate_json(to_json(values), strict=True, self_instance=blank)
    return check.validate_python(values, self_instance=blank)


OneMethod = Annotated[SerializeAsAny[Method], BeforeValidator(_as_method)]


class Recipe(BaseModel):
    """A run: a model, a method (or a union of methods), data, how it is trained, and where it goes.

    Errors: RecipeError with the path of the key.

    Example:
        >>> recipe = Recipe(model="minilm", method={"name": "lora", "rank": 4},
        ...                 data={"task": "classification", "dataset": "drugreview"})
        >>> recipe.method[0].rank, str(recipe.folder)
        (4, 'runs/run')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str = Field("run", description="of the run and its delta; by default the name of the recipe's file")
    model: str = Field(min_length=1, description="a folder, a packaged model (`minilm`, `dinov2-s-saliency`), or "
                       "ORG/NAME of the hub")
    method: Annotated[tuple[OneMethod, ...], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="what is trained: a method, {name: lora, rank: 8}, or a list of them, which is their union")
    data: DataSpec = Field(description="what is read")
    seed: int = Field(0, ge=0, lt=2**32, description="of new weights; and, where train.seed is not given, of the order "
                      "of the examples and of dropout. data.seed, which draws splits, stays apart")
    privacy: PrivacySpec | None = Field(None, description="differential privacy of the training examples")
    prune: PruneSpec | None = Field(None, description="what is pruned, by which criterion, and when")
    distill: Distillation | None = Field(None, description="a teacher, whose outputs are learnt beside the labels")
    train: TrainSpec = Field(default_factory=TrainSpec, description="how it is trained")
    output: str = Field(default_factory=lambda data: f"runs/{data['name']}", min_length=1,
                        description="folder of the run; by default runs/NAME")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, Document("recipe", values), type(self)) from None

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("a name has letters, digits, '_', '-' and '.', and begins with a letter or digit")
        return name

    @field_validator("distill")
    @classmethod
    def _taught(cls, distill: Distillation | None, info: ValidationInfo) -> Distillation | None:
        if distill is not None and info.data.get("privacy") is not None:
            raise ValueError("a teacher's loss is not one of single examples: privacy cannot be kept. Leave one out")
        return distill

    @field_validator("train")
    @classmethod
    def _seeded(cls, train: TrainSpec, info: ValidationInfo) -> TrainSpec:
        if info.data.get("privacy") is not None:
            data = info.data.get("data")
            if data is not None and data.task == "causal_lm" and data.pack:
                raise ValueError("data.pack cuts texts into blocks, and privacy would be of blocks and not of texts: "
                                 "set data.pack=false")
            try:
                train = private_spec(train)
            except RecipeError as error:
                raise RecipeError(error.what.removeprefix("train."), *error.more) from None
        if "seed" in train.model_fields_set:
            return train
        return train.model_copy(update={"seed": info.data.get("seed", 0)})

    @property
    def delta_name(self) -> str:
        """The run's name as a delta's, which holds no dots."""
        return self.name.replace(".", "_")

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return Path(self.output).expanduser()

    def resolved(self) -> dict[str, Any]:
        """The whole tree with every default, as plain data that `read_recipe` reads back."""
        methods = [to_config(method) for method in self.method]
        tree = self.model_dump(mode="json", exclude={"method"})
        tree["method"] = methods[0] if len(methods) == 1 else methods
        return {key: tree[key] for key in type(self).model_fields}
