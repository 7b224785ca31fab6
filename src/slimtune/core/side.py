"""Side: a parallel network that climbs beside the backbone and never sends a gradient back into it.

    s_0 = start(h_0);  s_i = step(s_{i-1}, h_i);  the tower's output <- top(s_N)

Nothing that is trained is below a hidden state h_i, which is detached as it is read, so the backbone
keeps no graph. In an encoder-decoder the side encoder's end is the memory of the side decoder.
"""
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.init import Params
from slimtune.core.insert import CHILD, Bound, Insert, first, hook_with, named
from slimtune.core.method import Builder, Method
from slimtune.core.sites import Site
from slimtune.errors import MethodError

Masks: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A block's mask for its self-attention and for its cross-attention."""


class Side(Method):
    """The primitive of ladder side-tuning. A subclass states three groups of parameters and three steps."""

    primitive: ClassVar[str] = "side"
    identity: ClassVar[bool] = False

    def start_params(self, tower: Tower) -> Params:
        raise NotImplementedError

    def step_params(self, tower: Tower, site: Site, query: Site, ffn: int, cross: bool) -> Params:
        raise NotImplementedError

    def top_params(self, tower: Tower, ends: bool) -> Params:
        raise NotImplementedError

    def start(self, p: Bound, h: Tensor) -> Tensor:
        """s_0. Shapes: h (B, T, d) -> (B, T, d / r)."""
        raise NotImplementedError

    def step(self, p: Bound, s: Tensor, h: Tensor, masks: Masks, causal: bool, memory: Tensor | None) -> Tensor:
        """s_i. Shapes: s (B, T, d / r), h (B, T, d); masks as `scaled_dot_product_attention` takes them."""
        raise NotImplementedError

    def top(self, p: Bound, s: Tensor) -> Tensor:
        """The side network's end. Shapes: (B, T, d / r) -> (B, T, d), or (B, T, d / r) for a memory."""
        raise NotImplementedError

    def install(self, build: Builder) -> None:
        names = [t.name for t in build.anatomy.towers]
        for tower in build.anatomy.towers:
            if tower.grid:
                raise MethodError(f"{type(self).__name__} cannot go on {build.anatomy.model_type}: its token grid "
                                  "changes between stages, and the ladder has one width.",
                                  "Use a method that adds to a module's output.")
            feeds = tower.name == "encoder" and "decoder" in names
            self._climb(build, tower, cross=tower.name == "decoder" and "encoder" in names)
            site = Site(tower.name, None, "memory" if feeds else "top", tower.final, tower.width, tower.width)
            build.slot(self, site, "top", self.top_params(tower, ends=not feeds))
            hook_with(build.module(tower.final), _top)

    def _climb(self, build: Builder, tower: Tower, cross: bool) -> None:
        sites = [s for s in build.anatomy.sites if s.tower == tower.name]
        for index, path in enumerate(tower.blocks):
            own = [s for s in sites if s.block == index]
            query = next(s for s in own if s.role == "attn.heads")
            ffn = next(s.d_in for s in own if s.role == "mlp.down")
            site = Site(tower.name, index, "block", path, tower.width, tower.width, cross=cross,
                        heads=query.d_in // query.head_dim, head_dim=query.head_dim)
            params = self.step_params(tower, site, query, ffn, cross)
            slot = build.slot(self, site, "ladder", params | (self.start_params(tower) if index == 0 else {}))
            slot.causal = tower.causal
            hook_with(build.module(path), _step)


def _step(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    for slot in insert.live("ladder"):
        h = (out[0] if isinstance(out, tuple) else out).detach()
        p, side, call = slot.bind(h), slot.method, named(block, args, kwargs)
        key = f"ladder/{slot.site.tower}"
        if slot.site.block == 0:
            _refuse_cache(call, h.shape[1], type(side).__name__)
            s = side.start(p, first(args, kwargs).detach())
        else:
            s = insert.plan.take(key)
        memory = insert.plan.peek("memory") if slot.site.cross else None
        if memory is not None and memory.shape[0] != h.shape[0]:  # beams repeat their example
            memory = memory.repeat_interleave(h.shape[0] // memory.shape[0], 0)
        masks = _mask(call.get("attention_mask"), h), _mask(call.get("encoder_attention_mask"), h)
        insert.plan.put(key, side.step(p, s, h, masks, slot.causal, memory))


def _top(final: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    insert: Insert = final._modules[CHILD]  # type: ignore[assignment]
    for slot in insert.live("top"):
        y = out[0] if isinstance(out, tuple) else out
        s = insert.plan.take(f"ladder/{slot.site.tower}")
        result = slot.method.top(slot.bind(y), s)
        if slot.site.role == "memory":
            insert.plan.put("memory", result)
            return None
        result = result.to(y.dtype)
        out = (result, *out[1:]) if isinstance(out, tuple) else result
    return out


def _mask(mask: Any, h: Tensor) -> Tensor | None:
    """A block's own mask, as booleans or an additive float, or None where nothing is masked."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    mask = mask[:, :1]
    return mask.to(h.dtype) if mask.is_floating_point() else mask.bool()


def _refuse_cache(call: dict[str, Any], tokens: int, who: str) -> None:
    """A cache that holds more than this call's tokens stands for hidden states the ladder never saw."""
    cache = call.get("cache") if call.get("cache") is not None else call.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and int(cache.get_seq_length()) > tokens:
        raise MethodError(f"{who} has no cache of its own: its side network must see the whole sequence at each step.",
                          "Call generate(..., use_cache=False).")


HOOKS = (_step, _top)
