"""adapter_config.json: the fields that slimtune reads, those that change nothing, and those it refuses by name."""
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimtune.errors import DeltaError, listing, suggest
from slimtune.io.delta_folder import CONFIG, NOTHING

Targets = list[str] | str | None


class Common(BaseModel):
    """What every PEFT config may say. Types are strict: a text is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    task_type: str | None = None
    modules_to_save: list[str] | None = None


class Targeted(Common):
    """The modules a method goes on."""

    target_modules: Targets = None
    exclude_modules: Targets = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Targets = None


class LoraFields(Targeted):
    """LoRA: y <- y + (alpha / r) B A x, or alpha / sqrt(r)."""

    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True


class Ia3Fields(Targeted):
    """(IA)^3: outputs of target modules, or inputs of feed-forward modules, times a vector."""

    feedforward_modules: Targets = None


class PromptFields(Common):
    """Prompt tuning: tokens in front of the input."""

    num_virtual_tokens: int = Field(ge=1)
    token_dim: int | None = None
    num_transformer_submodules: int | None = None


class PrefixFields(PromptFields):
    """Prefix tuning: keys and values in front of every attention's own."""

    num_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)


_NEUTRAL = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
            "runtime_config"}
_LORA_NEUTRAL = {
    "fan_in_fan_out",  # PEFT itself corrects it by the module's class; A and B have one layout
    "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "loftq_config", "corda_config",
    "lora_ga_config"}  # these matter at the start of training, or with an `init_lora_weights` that is refused below
_IA3_NEUTRAL = {"fan_in_fan_out", "init_ia3_weights"}
_PROMPT_NEUTRAL = {"num_layers", "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text",
                   "tokenizer_name_or_path", "tokenizer_kwargs"}
_PREFIX_NEUTRAL = {"encoder_hidden_size", "prefix_projection", "init_weights"}  # what is saved is projected already
_BASE_KEPT = ("gaussian", "eva", "orthogonal")

_REMEDY = {
    "use_dora": "It is DoRA; PEFT's merge_and_unload() or a LoRA of its own can be loaded.",
    "lora_bias": "It adds a bias to B. Train with lora_bias=false.",
    "layer_replication": "It repeats layers of the base. Load the enlarged model in peft.",
    "trainable_token_indices": "It trains rows of the embedding. Train without it.",
    "target_parameters": "It adapts stacked expert weights. Target modules instead.",
    "use_qalora": "It pools the input of A. Train with use_qalora=false.",
    "alora_invocation_tokens": "It switches on at a token. Train a plain LoRA.",
    "megatron_config": "It is for layers of Megatron.",
}

SUPPORTED: dict[str, tuple[type[Common], set[str]]] = {
    "LORA": (LoraFields, _LORA_NEUTRAL),
    "IA3": (Ia3Fields, _IA3_NEUTRAL),
    "LN_TUNING": (Targeted, set()),
    "PROMPT_TUNING": (PromptFields, _PROMPT_NEUTRAL),
    "PREFIX_TUNING": (PrefixFields, _PREFIX_NEUTRAL),
}
T = TypeVar("T", bound=Common)


def read_config(config: Mapping[str, Any], folder: str) -> tuple[str, Common]:
    """The type and the checked fields of an adapter_config.json.

    Errors: DeltaError for a type that is not read, a value of the wrong kind, and any field that would change the
    result and is not supported; it says which.
    Example:
        >>> kind, fields = read_config({"peft_type": "LORA", "r": 4}, "sst2")
        >>> kind, fields.r
        ('LORA', 4)
    """
    where, kind = f"{folder}: {CONFIG}", config.get("peft_type")
    if not isinstance(kind, str) or kind not in SUPPORTED:
        told = "names no peft_type" if kind is None else f"has peft_type {kind!r}, which slimtune does not read"
        raise DeltaError(f"{where} {told}.", f"It reads: {listing(SUPPORTED)}.",
                         suggest(str(kind), SUPPORTED), NOTHING)
    cls, neutral = SUPPORTED[kind]
    try:
        fields = cls(**config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DeltaError(f"{where}: {key}: {first['msg']} (got {first.get('input')!r}).", NOTHING) from None
    _refuse(config, {*cls.model_fields, *neutral, *_NEUTRAL}, where)
    if isinstance(fields, LoraFields):
        _refuse_lora(fields, where)
    _check_patterns(fields, where)
    return kind, fields


def _refuse(config: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in sorted(set(config) - known):
        if config[key] not in (None, False, [], {}, ""):
            what = "which slimtune does not support" if key in _REMEDY else "a field that slimtune does not know"
            raise DeltaError(f"{where}: {key} is {str(config[key])[:60]!r}, {what}.",
                             _REMEDY.get(key, "It may change the result, so it is not ignored."), NOTHING)


def _refuse_lora(fields: LoraFields, where: str) -> None:
    if fields.bias != "none":
        raise DeltaError(f"{where}: bias is '{fields.bias}': biases of the base were trained as well.",
                         "Train with bias='none', or use BitFit and LoRA as a union here.", NOTHING)
    init = fields.init_lora_weights
    if isinstance(init, str) and init not in _BASE_KEPT:
        raise DeltaError(f"{where}: init_lora_weights is '{init}', which changes the base's own weights.",
                         "Save it in peft with path_initial_model_for_weight_conversion: a plain LoRA. Load that.",
                         NOTHING)


def _check_patterns(fields: Common, where: str) -> None:
    for key, value in fields:
        texts = [value] if isinstance(value, str) and "modules" in key else value if key == "modules_to_save" else []
        texts = [*(texts or []), *(value if key.endswith("_pattern") and isinstance(value, dict) else [])]
        for text in texts:
            try:
                re.compile(text)
            except re.error as error:
                raise DeltaError(f"{where}: {key}: {text!r} is no regular expression ({error}).", NOTHING) from None
