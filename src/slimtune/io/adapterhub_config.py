"""AdapterHub's adapter_config.json: what slimtune reads of each architecture, what changes nothing, what it refuses."""
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimtune.errors import DeltaError, listing, suggest
from slimtune.io.delta_folder import CONFIG, NOTHING


class Part(BaseModel):
    """What every architecture may say. Types are strict: a text is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    leave_out: list[int] | None = None
    use_gating: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    def layers(self, count: int) -> list[int]:
        """The layers it goes on."""
        return [i for i in range(count) if i not in (self.leave_out or ())]


class Bottleneck(Part):
    """Bottlenecks behind or beside sub-layers. The defaults are the library's."""

    mh_adapter: bool
    output_adapter: bool
    cross_adapter: bool = False
    reduction_factor: float | dict[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    inv_adapter: str | None = None
    phm_layer: bool = False
    phm_dim: int = Field(4, ge=1)
    phm_rank: int = Field(1, ge=1)
    phm_bias: bool = True
    factorized_phm_W: bool = True  # noqa: N815 (the file's own name)
    shared_W_phm: bool = False  # noqa: N815
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False


class Lora(Part):
    """LoRA, and (IA)^3, which is its composition_mode="scale"."""

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    attn_matrices: list[str] = ["q", "v"]
    r: int = Field(8, ge=1)
    alpha: float = 8
    composition_mode: Literal["add", "scale"] = "add"
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None


class Prefix(Part):
    """Prefix tuning; flat, or from a small network."""

    encoder_prefix: bool = True
    cross_prefix: bool = True
    flat: bool = False
    prefix_length: int = Field(30, ge=1)
    bottleneck_size: int = Field(512, ge=1)
    non_linearity: str = "tanh"


_START = {"architecture", "init_weights", "init_weights_seed"}
_NEUTRAL: dict[type[Part], set[str]] = {
    Bottleneck: {"inv_adapter_reduction_factor", "phm_c_init", "phm_init_range", "learn_phm",
                 "hypercomplex_nonlinearity", "stochastic_depth",  # of the start and of training
                 "attention_type", "new_attention_norm", "invertible_adapter"},  # of files before 2021
    Lora: {"dtype"},
    Prefix: {"shared_gating"},
}
ARCHITECTURES: dict[str | None, type[Part]] = {None: Bottleneck, "bottleneck": Bottleneck, "lora": Lora,
                                               "prefix_tuning": Prefix}
_REMEDY = {
    "use_gating": "A gate is computed from every input; slimtune has none.",
    "use_dora": "It is DoRA. Merge it in the library, or train a LoRA.",
    "vera_d": "It is VeRA. Merge it in the library, or train a LoRA.",
    "vera_b": "It is VeRA. Merge it in the library, or train a LoRA.",
}
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "gelu_fast": "gelu_new", "tanh": "tanh",
               "gelu_pytorch_tanh": "gelu_new", "swish": "silu", "silu": "silu", "quick_gelu": "quick_gelu",
               "linear": "identity"}
"""The library's names of activations, and ours."""
T = TypeVar("T", bound=Part)


def refuse(where: str, key: str, value: Any, *why: str) -> DeltaError:
    """The error for a field that would change the result and cannot be had here."""
    return DeltaError(f"{where}: {key} is {str(value)[:60]!r}, which slimtune does not support.", *why, NOTHING)


def read_parts(top: Mapping[str, Any], folder: str) -> list[Part]:
    """The checked parts of an adapter_config.json: one, or those of a union, LoRA and (IA)^3 first.

    A LoRA of `adapters` before 1.1.0 was trained as if alpha were r, whatever the file says, and is read so.
    Errors: DeltaError for an architecture that is not read, a value of the wrong kind, and any field that would
    change the result and is not supported; it says which.
    Example:
        >>> read_parts({"name": "a", "config": {"architecture": "lora", "r": 4, "alpha": 8}}, "sst2")[0].alpha
        8.0
    """
    where, config = f"{folder}: {CONFIG}", top.get("config")
    if not isinstance(config, dict):
        raise DeltaError(f"{where}: 'config' is no object.", NOTHING)
    if config.get("architecture") == "union":
        configs = config.get("configs")
        if not isinstance(configs, list) or not configs or not all(isinstance(c, dict) for c in configs):
            raise DeltaError(f"{where}: 'configs' of a union is no list of objects.", NOTHING)
        extra = {k: v for k, v in config.items() if k not in ("architecture", "configs") and v is not None}
        _unknown(extra, set(), where)
    else:
        configs = [config]
    parts = [_part(_as_trained(c, top), where) for c in configs]
    # an adapter behind a linear layer reads what that layer's LoRA gave
    return sorted(parts, key=lambda part: isinstance(part, Bottleneck))


def _as_trained(config: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Mend what older versions wrote otherwise."""
    version = top.get("version")
    if version is None and config.get("non_linearity") in _RENAMED:
        config = {**config, "non_linearity": _RENAMED[config["non_linearity"]]}
    inverse = config.get("invertible_adapter")
    if isinstance(inverse, dict):
        config = {**config, "inv_adapter": inverse.get("block_type")}
    old = re.match(r"adapters\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if old and (int(old[1]), int(old[2])) < (1, 1) and config.get("architecture") == "lora" and "r" in config:
        config = {**config, "alpha": config["r"]}
    return config


def _part(config: Mapping[str, Any], where: str) -> Part:
    kind = config.get("architecture")
    cls = ARCHITECTURES.get(kind) if isinstance(kind, str | None) else None
    if cls is None:
        raise DeltaError(f"{where}: architecture is {str(kind)[:60]!r}, which slimtune does not read.",
                         f"It reads: bottleneck {listing(k for k in ARCHITECTURES if k not in (None, 'bottleneck'))} "
                         "union.", suggest(str(kind), [k for k in ARCHITECTURES if k]), NOTHING)
    try:
        part = cls(**config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        raise DeltaError(f"{where}: {key}: {first['msg']} (got {first.get('input')!r}).", NOTHING) from None
    _unknown(config, {*cls.model_fields, *_START, *_NEUTRAL[cls]}, where)
    for key, why in _REMEDY.items():
        value = getattr(part, key, None)
        if value is not None and value is not False:  # 0.0 is a value
            raise refuse(where, key, value, why)
    if isinstance(part, Lora) and part.composition_mode == "scale":
        for key, wanted in (("r", 1), ("alpha", 1), ("dropout", 0.0)):
            if getattr(part, key) != wanted:
                raise refuse(where, key, getattr(part, key), f"With composition_mode 'scale' it must be {wanted}.")
    return part


def _unknown(config: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in sorted(set(config) - known):
        if config[key] not in (None, False, [], {}, ""):
            raise DeltaError(f"{where}: {key} is {str(config[key])[:60]!r}, a field that slimtune does not know.",
                             "It may change the result, so it is not ignored.", NOTHING)


def check_inverse(part: Bottleneck, kind: Any, keys: list[str], where: str) -> None:
    """Errors: DeltaError for invertible adapters; task adapters of old files name some that they do not have."""
    held = any("invertible" in key for key in keys)
    if part.inv_adapter is not None and (held or kind != "text_task"):
        raise refuse(where, "inv_adapter", part.inv_adapter, "It changes the embeddings and has no place here.")
