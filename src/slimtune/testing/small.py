"""A small configuration of any method, for backbones of width 32."""
from typing import Any

from slimtune.core.method import Method, key_of

SIZES: dict[str, Any] = {"rank": 2, "bottleneck": 4, "length": 3, "reduction": 4, "dimension": 50}
"""Values of the fields that many methods share."""

OWN: dict[str, dict[str, Any]] = {"phm_adapter": {"division": 2, "rank": None}, "adapter_drop": {"drop": 1},
                                  "kadaptation": {"division": 4}, "dsee": {"outer": 2, "nonzero": 8}}
"""Values of single methods, by name, where the shared ones do not do."""


def small(cls: type[Method], **values: Any) -> Method:
    """A method with small sizes, and its other defaults.

    Example:
        >>> from slimtune.methods import LoRA
        >>> small(LoRA).rank
        2
    """
    fields = {k: v for k, v in SIZES.items() if k in cls.model_fields}
    return cls(**{**fields, **OWN.get(key_of(cls), {}), **values})
