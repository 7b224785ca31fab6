"""The core: anatomy, the four primitives, and the delta. What a method file imports stands here."""
from slimtune.core.adapter import Adapter, BehindNorm, InitName
from slimtune.core.add import Add
from slimtune.core.affine import ACTIVATIONS, Activation, affine, layer_norm, scalar, vector
from slimtune.core.anatomy import Anatomy, Tower, dissect
from slimtune.core.attach import attach
from slimtune.core.average import average
from slimtune.core.bound import Bound
from slimtune.core.count import Count
from slimtune.core.delta import Delta
from slimtune.core.families import FAMILIES, TowerSpec
from slimtune.core.init import Init, Params, kaiming, normal, of_weight, ones, truncated_normal, uniform, xavier, zeros
from slimtune.core.insert import Slot
from slimtune.core.keyvalues import KeysValues
from slimtune.core.kronecker import kron_apply, kron_sum
from slimtune.core.load import load_delta
from slimtune.core.lowrank import low_rank_add
from slimtune.core.method import Builder, Method, Norms, find, from_config, key_of, register, registered, to_config
from slimtune.core.phm import PHM
from slimtune.core.side import Side
from slimtune.core.sites import Site, join
from slimtune.core.switch import activate, deltas
from slimtune.core.tokens import Prompt
from slimtune.core.unfreeze import Unfreeze, base_parameters

__all__ = [
    "ACTIVATIONS", "FAMILIES", "PHM", "Activation", "Adapter", "Add", "Anatomy", "BehindNorm", "Bound", "Builder",
    "Count", "Delta", "Init", "InitName", "KeysValues", "Method", "Norms", "Params", "Prompt", "Side", "Site", "Slot",
    "Tower", "TowerSpec", "Unfreeze", "activate", "affine", "attach", "average", "base_parameters", "deltas",
    "dissect", "find", "from_config", "join", "kaiming", "key_of", "kron_apply", "kron_sum", "layer_norm", "load_delta",
    "low_rank_add", "normal", "of_weight", "ones", "register", "registered", "scalar", "to_config",
    "truncated_normal", "uniform", "vector", "xavier", "zeros",
]
