"""Where the text's positions start when keys and values stand in front of it.

`apart`: the text keeps its positions 0, 1, ...; the prefix has none. `before`: the prefix takes the first l, as
it does when it is a cache (Li and Liang's code, PEFT): learned and rotary positions of the text count from l, and
relative biases (T5) see the prefix at distances 1 and more.
"""
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimtune.core.insert import CHILD, Insert, Slot, hook_with
from slimtune.core.sites import Site, join, lookup
from slimtune.errors import MethodError

if TYPE_CHECKING:
    from slimtune.core.method import Builder, Method

ENTRIES = ("embeddings.position_embeddings", "wpe", "embed_positions", "rotary_emb")
"""The module that a tower sends its position numbers through, by path from the tower."""


def stand_before(method: "Method", build: "Builder", slots: list[Slot]) -> None:
    """Let the prefix in these slots take the first positions of its towers.

    Errors: MethodError for a tower whose positions come in neither way.
    """
    for name in dict.fromkeys(slot.site.tower for slot in slots):
        tower = next(t for t in build.anatomy.towers if t.name == name)
        module = build.module(tower.path)
        entry = next((e for e in ENTRIES if lookup(module, e) is not None), None)
        biased = next((m for m in module.modules() if hasattr(m, "relative_attention_bias")
                       and hasattr(m, "compute_bias")), None)
        if entry is not None:
            path = join(tower.path, entry)
            build.slot(method, Site(name, None, "positions", path, tower.width, tower.width), "positions", {})
            hook_with(build.module(path), _shift, pre=True)
        elif biased is not None:
            for slot in slots:
                if slot.site.tower == name and not slot.site.cross:
                    slot.relative = (biased,)  # a tuple, so that it is not registered twice
        else:
            raise MethodError(f"{type(method).__name__}(positions='before') cannot go on {build.anatomy.model_type}: "
                              f"where its {name} takes position numbers is not known.", "Use positions='apart'.")


def prefix_bias(slot: Slot, query: Tensor, key: Tensor, length: int) -> Tensor | None:
    """T5's bias of each query for a prefix that stands before the text, (1, H, T, length), or None.

    Shapes: query (B, H, T, c); key (B, K, S, c), the text's own, with what is cached.
    """
    if not slot.relative:
        return None
    module: Any = slot.relative[0]
    seen = key.shape[2] - query.shape[2]
    bias = module.compute_bias(query.shape[2], length, device=query.device, past_seen_tokens=length + seen)
    return bias.to(query.dtype)


def _shift(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = entry._modules[CHILD]  # type: ignore[assignment]
    length = sum(slot.method.length for slot in insert.live("positions"))
    if not length:
        return None
    if kwargs.get("position_ids") is not None:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + length}
    number = len(args) - 1  # (hidden states, positions), or positions alone
    ids, padding = args[number], getattr(entry, "padding_idx", None)
    moved = ids + length if padding is None else ids + length * (ids != padding).to(ids.dtype)
    return (*args[:number], moved), kwargs


HOOKS = (_shift,)
