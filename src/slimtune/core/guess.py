"""The roles of a model that has no model_type of transformers: timm's ViTs, which are known by what they have.

For any other model, a guess by names and shapes, shown, never silent.
"""
import re
from dataclasses import replace

from torch import Tensor, nn

from slimtune.core.families import TIMM, TowerSpec
from slimtune.errors import AnatomyError, listing

_NAMES = {
    "attn.q": r"(q|query|q_proj|q_lin|query_proj|wq)$",
    "attn.k": r"(k|key|k_proj|k_lin|key_proj|wk)$",
    "attn.v": r"(v|value|v_proj|v_lin|value_proj|wv)$",
    "attn.o": r"(o|o_proj|out_proj|out_lin|wo|attention\.output\.dense|attn\.proj|attention\.dense)$",
    "mlp.gate": r"(gate_proj|wi_0|w1)$",
    "mlp.up": r"(up_proj|fc1|wi|wi_1|lin1|c_fc|w3|intermediate\.dense|dense_h_to_4h)$",
    "mlp.down": r"(down_proj|fc2|wo|lin2|w2|output\.dense|dense_4h_to_h)$",
}


def timm_tower(base: nn.Module) -> TowerSpec | None:
    """The tower of a ViT of timm: `blocks` whose `attn.qkv` is one projection, and `num_prefix_tokens`; else None.

    Errors: AnatomyError where the projection is not run as a module, so that no hook would see it.
    """
    blocks, prefix = getattr(base, "blocks", None), getattr(base, "num_prefix_tokens", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks) or not isinstance(prefix, int):
        return None
    attention = getattr(next(blocks.children()), "attn", None)
    if not isinstance(getattr(attention, "qkv", None), nn.Linear):
        return None
    if any(getattr(attention, name, None) is not None for name in ("q_bias", "v_bias")):
        raise AnatomyError(f"{type(base).__name__} keeps the biases of its fused query, key and value projection apart "
                           "and runs it past its module, where nothing can be added.",
                           "Use the same model of transformers, for example BeitModel.")
    return replace(TIMM, prefix_tokens=prefix)


def guess(base: nn.Module) -> tuple[TowerSpec, ...]:
    """One tower for each list of two or more blocks of one class that holds an attention.

    Errors: AnatomyError when no such list is found; it names the lists that are there.
    """
    lists = [(path, m) for path, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    every = [(path, _roles(next(m.children()))) for path, m in lists]
    found = [(path, roles) for path, roles in every if "attn.q" in roles]
    outer = [(p, r) for p, r in found if not any(p.startswith(q + ".") for q, _ in found if q != p)]
    if not outer:
        raise AnatomyError(
            f"{type(base).__name__}: no list of Transformer blocks with query, key and value projections was found.",
            f"It has these lists of modules: {listing(p for p, _ in lists) or 'none'}",
            "Pass anatomy=slimtune.dissect(model, towers=[TowerSpec(...)]) to say where its blocks are.")
    names = ["encoder", "decoder"] if len(outer) == 2 else ["encoder"] + [f"tower{i}" for i in range(1, len(outer))]
    embed = next((p for p, m in base.named_modules() if isinstance(m, nn.Embedding)), "")
    return tuple(TowerSpec(name, "", path, embed, roles) for name, (path, roles) in zip(names, outer, strict=True))


def _roles(block: nn.Module) -> dict[str, str]:
    found = {p: getattr(m, "weight", None) for p, m in block.named_modules()}
    weights = {p: weight for p, weight in found.items() if isinstance(weight, Tensor)}
    linears = [p for p, weight in weights.items() if weight.dim() == 2]
    roles: dict[str, str] = {}
    for role, pattern in _NAMES.items():
        for path in linears:
            if path not in roles.values() and re.search(rf"(^|\.){pattern}", path):
                roles.setdefault(role, path)
    norms = [p for p, weight in weights.items() if weight.dim() == 1]
    return roles | {f"norm.{part}": p for part, p in zip(("attn", "mlp"), norms, strict=False)}
