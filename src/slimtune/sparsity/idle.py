"""Idle: what is left of a block with no head or no neuron, and how little of it has to run.

Where norms stand before the sub-layers, an empty sub-layer adds a constant c, its bias, and its norm is read by
nobody; a block of empty sub-layers is x + c, which the block before it can add with its own bias:

    x' + W_down a + (b_down + c)
"""
from collections.abc import Mapping

from torch import Tensor, nn

from slimtune.core import Anatomy, Site
from slimtune.core.merge import wide
from slimtune.core.sites import lookup
from slimtune.sparsity.edits import Edits
from slimtune.sparsity.parts import Constant, Silent
from slimtune.sparsity.slicing import blocks_of


def idle_blocks(edits: Edits, model: nn.Module, anatomy: Anatomy, counts: Mapping[str, Mapping[str, int]],
                gone: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """The blocks of each tower that nothing is left of, their constants moved; norms without a reader are taken out.

    counts: heads and neurons left, by site; gone: blocks that are dropped anyway. Behind post-norms nothing is idle.
    """
    blocks, idle = blocks_of(anatomy), {}
    for tower in anatomy.towers:
        idle[tower.name] = set()
        if tower.post_norm or tower.grid or anatomy.guessed:
            continue
        last: Mapping[str, Site] = {}
        living = [i for i in range(len(tower.blocks)) if i not in gone[tower.name]]
        for index in living:
            own, cross = (blocks.get((tower.name, index, c), {}) for c in (False, True))
            empty = _empty(edits, model, own, cross, counts)
            spare = len(idle[tower.name]) < len(living) - 1
            if empty and spare and _move(edits, model, model.get_submodule(tower.blocks[index]), last):
                idle[tower.name].add(index)
            else:
                last = own
    return idle


def _empty(edits: Edits, model: nn.Module, own: Mapping[str, Site], cross: Mapping[str, Site],
           counts: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether all sub-layers of a block are empty; the norms of those that are go."""
    empty = True
    for sites, role, what, norm in ((own, "attn.heads", "heads", "norm.attn"),
                                    (cross, "attn.heads", "heads", "norm.cross"),
                                    (own, "mlp.act", "neurons", "norm.mlp")):
        if role in sites:  # else it was emptied before
            here = counts[what][sites[role].name] == 0
            empty &= here
            if here and norm in own:
                edits.module(model, own[norm].path, nn.Identity())
    return empty


def _move(edits: Edits, model: nn.Module, block: nn.Module, last: Mapping[str, Site]) -> bool:
    """Let the block before add what this one adds, if it adds anything; False when that cannot be."""
    if not (moved := [c for c in _constants(block) if bool((c != 0).any())]):
        return True
    down = lookup(model, last["mlp.down"].path) if "mlp.down" in last else None
    bias = down._parameters.get("bias") if down is not None else None
    if down is None or bias is None or any("layer_scale" in path for path, _ in block.named_modules()):
        return False
    edits.tensor(down, "bias", sum(moved, wide(bias)).to(bias.dtype))
    return True


def _constants(block: nn.Module) -> list[Tensor]:
    """The biases of an empty block's sub-layers: of what stands for an attention, and of maps that read nothing."""
    biases = [m._parameters.get("bias") for m in block.modules() if isinstance(m, Silent | Constant)]
    return [wide(b) for b in biases if b is not None]
