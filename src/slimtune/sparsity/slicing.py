"""Slicing: the heads and neurons of one block cut out of its matrices, and blocks out of their tower.

    heads:    rows of attn.q, attn.k, attn.v and columns of attn.o
    neurons:  rows of mlp.up and mlp.gate and columns of mlp.down

What a module knows about its heads beside the shapes of its weights is told by name below: data, no code.
"""
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core import Anatomy, Site, join
from slimtune.core.sites import lookup, widths
from slimtune.errors import MethodError
from slimtune.sparsity.edits import Edits
from slimtune.sparsity.parts import Constant, Factored, Silent

COUNTS = ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads")
"""Attributes of an attention module that count its heads."""
WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "dim", "attn_dim", "embedding_dim")
"""Attributes of a module that hold the width of all its heads."""
ROWS = ("pos_key_proj", "pos_query_proj")
"""More linear maps of an attention module whose outputs are its heads (DeBERTa's, of relative positions)."""
TABLES = ("relative_position_bias_table",)
"""Parameters of a block with a column a head (BEiT, Swin)."""
SHARED = ("relative_attention_bias", "shared_position_bias")
"""Modules that hold a bias a head for all blocks of a tower (T5, MPNet, BEiT with shared positions)."""
DEPTHS = ("{tower}_layers", "num_{tower}_layers", "num_hidden_layers")
"""Keys of a config that count a tower's blocks."""
PER_BLOCK = ("layer_types",)
"""Keys of a config that list something for each block."""

Block = Mapping[str, Site]


def blocks_of(anatomy: Anatomy) -> dict[tuple[str, int, bool], dict[str, Site]]:
    """The sites by role of each block; those of its cross-attention apart, under True."""
    found: dict[tuple[str, int, bool], dict[str, Site]] = {}
    for site in anatomy.sites:
        if site.block is not None:
            found.setdefault((site.tower, site.block, site.cross), {})[site.role] = site
    return found


def cut_shared(edits: Edits, model: nn.Module, anatomy: Anatomy, kept: Mapping[str, Tensor]) -> None:
    """Slice the biases that all blocks of a tower add to their heads' scores. kept: the heads left, by site.

    Errors: MethodError when the blocks do not all keep the same heads, and at least one.
    """
    for tower in anatomy.towers:
        places = [(path, m) for path, m in model.get_submodule(tower.path).named_modules()
                  if path.rpartition(".")[2] in SHARED]
        for cross in (False, True):
            sites = [s for s in anatomy.sites if s.name in kept and s.role == "attn.heads" and s.tower == tower.name
                     and s.cross == cross]
            left = {tuple(kept[s.name].tolist()) for s in sites}
            if not places or all(len(kept[s.name]) == s.heads for s in sites):
                continue
            if len(left) > 1 or () in left:
                raise MethodError(f"heads of {anatomy.model_type} cannot be cut block by block: all blocks share "
                                  f"{join(tower.path, places[0][0])}, a bias for each head.",
                                  "Cut the same heads in every block and keep one, or cut neurons.")
            for _, module in [] if cross else places:
                _tables(edits, module, sites[0].heads, kept[sites[0].name], sites[0].heads)


def cut_heads(edits: Edits, model: nn.Module, anatomy: Anatomy, block: Block, kept: Tensor) -> None:
    """Slice an attention to these heads (groups of heads, where they share keys and values)."""
    site = block["attn.heads"]
    if len(kept) == site.heads:
        return
    attention = model.get_submodule(str(site.attention))
    if not len(kept):
        _silence(edits, model, site, block["attn.o"])
        return
    parts = {role: _spread(kept, block[role].d_out // site.heads) for role in ("attn.q", "attn.k", "attn.v")}
    queries = block["attn.q"].d_out
    paths: dict[str, list[Tensor]] = {}
    for role, rows in parts.items():
        paths.setdefault(block[role].path, []).append(rows + (block[role].part or (0,))[0])
    for path, rows in paths.items():
        edits.rows(model.get_submodule(path), torch.cat(rows))
    edits.columns(model.get_submodule(site.path), parts["attn.q"])
    for name in ROWS:
        if isinstance(linear := getattr(attention, name, None), nn.Module):
            edits.rows(linear, parts["attn.q"])
    _count(edits, attention, site.heads, queries, len(kept))
    home = model.get_submodule(anatomy.tower(site.tower).blocks[site.block or 0])
    _tables(edits, home, queries // site.head_dim, kept, site.heads)


def _spread(kept: Tensor, width: int) -> Tensor:
    """The rows of units that are `width` rows each."""
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _count(edits: Edits, attention: nn.Module, units: int, queries: int, kept: int) -> None:
    """Scale what the module says of its heads by the share that is kept."""
    for name in (*COUNTS, *WIDTHS):
        value = vars(attention).get(name)
        if isinstance(value, int) and (name in COUNTS or value == queries):
            edits.attribute(attention, name, value * kept // units)


def _tables(edits: Edits, block: nn.Module, heads: int, kept: Tensor, units: int) -> None:
    """Slice the columns of the tables in a block, or of one that all blocks share."""
    columns = _spread(kept, heads // units)
    for path, module in block.named_modules():
        if any(name in SHARED for name in path.split(".")):  # cut once for all blocks
            continue
        for name in ("weight",) if isinstance(module, nn.Embedding) else TABLES:
            if (table := module._parameters.get(name)) is not None:
                edits.tensor(module, name, table.index_select(1, columns.to(table.device)))
                _count(edits, module, units, heads, len(kept))


def _silence(edits: Edits, model: nn.Module, site: Site, out: Site) -> None:
    """Put next to nothing in the place of an attention without heads."""
    path = str(site.attention)
    attention, projection = model.get_submodule(path), model.get_submodule(out.path)
    index = getattr(attention, "layer_idx", None)
    if not out.path.startswith(path + "."):  # BERT's projection stands behind its attention, and adds its bias there
        edits.module(model, path, Silent(0, bias=False, layer_idx=index))
        edits.module(model, out.path, _with_bias(Constant, projection))
        return
    edits.module(model, path, _with_bias(Silent, projection, index))


def _with_bias(kind: Callable[..., nn.Module], projection: nn.Module, *more: Any) -> nn.Module:
    """What stands for a projection that reads nothing: its bias, if it has one."""
    last = projection.up if isinstance(projection, Factored) else projection
    bias = last._parameters.get("bias")
    made = kind(widths(last)[1], bias is not None, *more)
    made._parameters["bias"] = bias
    return made.train(projection.training)


def cut_neurons(edits: Edits, model: nn.Module, block: Block, kept: Tensor) -> None:
    """Slice a feed-forward network to these neurons."""
    act = block["mlp.act"]
    if len(kept) == act.d_out:
        return
    for role in ("mlp.up", "mlp.gate"):
        if role not in block:
            continue
        if block[role].d_out != act.d_out:  # DINOv2's giant has both in one matrix
            raise MethodError(f"neurons of {act.name} cannot be cut: its gate and its values are one matrix.")
        edits.rows(model.get_submodule(block[role].path), kept)
    down = model.get_submodule(act.path)
    if len(kept):
        edits.columns(down, kept)
    else:
        edits.module(model, act.path, _with_bias(Constant, down))


def cut_blocks(edits: Edits, model: nn.Module, anatomy: Anatomy, tower: str, gone: Iterable[int]) -> None:
    """Take whole blocks out of a tower, and let configs and caches count what is left.

    Errors: MethodError for a hierarchical tower, or when no block would be left.
    """
    spec, gone = anatomy.tower(tower), set(gone)
    depth, lists = len(spec.blocks), {path.rpartition(".")[0] for path in spec.blocks}
    kept = [i for i in range(depth) if i not in gone]
    if not gone:
        return
    if spec.grid or len(lists) > 1:
        raise MethodError(f"blocks of {anatomy.model_type} cannot be taken out: its stages have different widths.",
                          "Cut heads and neurons instead.")
    if not kept:
        raise MethodError(f"shrink would leave no block in the {tower}.", "Keep at least one.")
    blocks = [model.get_submodule(spec.blocks[i]) for i in kept]
    for new, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                edits.attribute(module, "layer_idx", new)
    edits.module(model, lists.pop(), nn.ModuleList(blocks))
    _depths(edits, model, spec.path, tower, depth, kept)


def _depths(edits: Edits, model: nn.Module, path: str, tower: str, depth: int, kept: Sequence[int]) -> None:
    main = getattr(model, "config", None)
    own = getattr(lookup(model, path), "config", None)
    for config in {id(c): c for c in (main, own) if c is not None}.values():
        keys = [config.attribute_map.get(k, k) for k in (key.format(tower=tower) for key in DEPTHS)]
        keys = [k for k in dict.fromkeys(keys) if vars(config).get(k) == depth]
        for key in keys[:1] if config is main else keys:  # the main config counts the other tower's as well
            edits.attribute(config, key, len(kept))
        for key in PER_BLOCK:
            if isinstance(listed := vars(config).get(key), list) and len(listed) == depth:
                edits.attribute(config, key, [listed[i] for i in kept])
