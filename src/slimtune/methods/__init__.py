"""One file, one published method. The registry scans this folder; see docs/methods.md for the table."""
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from slimtune.core.method import Method, find, from_config, key_of, register, registered, to_config

for _module in iter_modules(__path__):
    _path = f"{__name__}.{_module.name}"
    for _value in vars(import_module(_path)).values():
        if isinstance(_value, type) and issubclass(_value, Method) and _value.__module__ == _path:
            register(_value)


def names() -> list[str]:
    """Every method's name, sorted.

    Example:
        >>> "lora" in names()
        True
    """
    return list(registered())


def get(name: str) -> type[Method]:
    """The class of a method by name. Errors: MethodError for an unknown one; it lists those that exist.

    Example:
        >>> get("lora")(rank=4).rank
        4
    """
    return find(name)


if TYPE_CHECKING:
    from slimtune.methods.adapter_drop import AdapterDrop
    from slimtune.methods.adapter_fusion import AdapterFusion
    from slimtune.methods.adapterbias import AdapterBias
    from slimtune.methods.adaptformer import AdaptFormer
    from slimtune.methods.added_bias import AddedBias
    from slimtune.methods.bitfit import BitFit
    from slimtune.methods.bottleneck_adapter import BottleneckAdapter
    from slimtune.methods.compacter import Compacter
    from slimtune.methods.compacter_plus_plus import CompacterPlusPlus
    from slimtune.methods.convpass import Convpass
    from slimtune.methods.dora import DoRA
    from slimtune.methods.dsee import DSEE
    from slimtune.methods.fact import FacT
    from slimtune.methods.full import Full
    from slimtune.methods.gates import Gates
    from slimtune.methods.houlsby import Houlsby
    from slimtune.methods.ia3 import IA3
    from slimtune.methods.intrinsic_dimension import IntrinsicDimension
    from slimtune.methods.kadaptation import KAdaptation
    from slimtune.methods.linear_probe import LinearProbe
    from slimtune.methods.loha import LoHa
    from slimtune.methods.lokr import LoKr
    from slimtune.methods.lora import LoRA
    from slimtune.methods.low_rank_adapter import LowRankAdapter
    from slimtune.methods.lst import LST
    from slimtune.methods.mam import MAM
    from slimtune.methods.mlp_head import MLPHead
    from slimtune.methods.multi_head_parallel_adapter import MultiHeadParallelAdapter
    from slimtune.methods.norm_tuning import NormTuning
    from slimtune.methods.parallel_adapter import ParallelAdapter
    from slimtune.methods.partial_k import PartialK
    from slimtune.methods.pfeiffer import Pfeiffer
    from slimtune.methods.phm_adapter import PHMAdapter
    from slimtune.methods.prefix_tuning import PrefixTuning
    from slimtune.methods.prompt_tuning import PromptTuning
    from slimtune.methods.ptuning_v2 import PTuningV2
    from slimtune.methods.repadapter import RepAdapter
    from slimtune.methods.scaled_parallel_adapter import ScaledParallelAdapter
    from slimtune.methods.side_tuning import SideTuning
    from slimtune.methods.ssf import SSF
    from slimtune.methods.tarp import TARP
    from slimtune.methods.vpt import VPT
else:
    def __getattr__(name: str) -> Any:
        for cls in registered().values():
            if cls.__name__ == name:
                return cls
        have = " ".join(cls.__name__ for cls in registered().values())
        raise AttributeError(f"slimtune.methods has no {name}; it has: {have}")

__all__ = [
    "DSEE",
    "IA3",
    "LST",
    "MAM",
    "SSF",
    "TARP",
    "VPT",
    "AdaptFormer",
    "AdapterBias",
    "AdapterDrop",
    "AdapterFusion",
    "AddedBias",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "CompacterPlusPlus",
    "Convpass",
    "DoRA",
    "FacT",
    "Full",
    "Gates",
    "Houlsby",
    "IntrinsicDimension",
    "KAdaptation",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRankAdapter",
    "MLPHead",
    "Method",
    "MultiHeadParallelAdapter",
    "NormTuning",
    "PHMAdapter",
    "PTuningV2",
    "ParallelAdapter",
    "PartialK",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RepAdapter",
    "ScaledParallelAdapter",
    "SideTuning",
    "from_config",
    "get",
    "key_of",
    "names",
    "register",
    "to_config",
]
