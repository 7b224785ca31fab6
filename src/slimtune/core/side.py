"""Side: a thin network of the backbone's own kind of blocks beside it, which sends no gradient back into it.

    s_0 = W_0 drop(h_0) + b_0;   s_i = Block_i(rung_i(s_{i-1}, h_i));   the tower's output <- top(s_N, h_N)

A tower runs under `no_grad` up to its end, and only our hooks inside it with the caller's grad mode: nothing
of the backbone is saved for backward, and gradient checkpointing, which has nothing to do there, stays off.
In an encoder-decoder the side encoder's end is the memory of the side decoder.
"""
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.bound import Bound
from slimtune.core.init import Params
from slimtune.core.insert import CHILD, Insert, Plan, Slot, first, hook_with, named
from slimtune.core.method import Builder, Method
from slimtune.core.sideblock import (
    Masks,
    block_params,
    drop,
    linear,
    linear_params,
    norm,
    norm_params,
    relative_bias,
    side_block,
)
from slimtune.core.sideshape import Shape, SideSite, read_shapes
from slimtune.core.structural import Walk, fisher
from slimtune.errors import MethodError


class Side(Method):
    """The primitive of side networks. A subclass states which blocks have a side block, `rung` and `top`.

    Every width is the backbone's over `reduction`, by integer division; the number of heads is the backbone's.
    start: the blocks and the final norm begin at random, or cut out of the backbone by magnitude or by
    Fisher information (see structural.py), for which `calibrate` needs data. dropout: in the side network,
    where the backbone's blocks have theirs. backbone_eval: the backbone's own dropout is off while the side
    network trains, so that what it computes can be kept. compat="official" leaves it on, and cuts as the
    paper's code does.
    """

    reduction: int = Field(8, ge=1, description="r: every width of the side network is the backbone's over r")
    start: Literal["random", "magnitude", "fisher"] = Field("magnitude", description="where its blocks start from")
    samples: int = Field(1024, ge=1, description="examples for start='fisher'")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the side network")
    backbone_eval: bool = Field(True, description="no dropout in the backbone while the side network trains")
    compat: Literal["paper", "official"] = "paper"

    primitive: ClassVar[str] = "side"
    identity: ClassVar[bool] = False
    silent: ClassVar[dict[str, str]] = {
        r"(self|cross)_k_bias$": "softmax ignores a shift of all keys by one vector",
        r"\.dropped\.": "its block has no side block; the paper's code counts its gate, and nothing reads it"}

    # what a subclass states

    def kept(self, tower: Tower) -> list[int]:
        """The blocks that have a side block, ascending."""
        raise NotImplementedError

    def rung_params(self, site: SideSite) -> Params:
        """What carries h_i into the side network, at a kept block."""
        return {}

    def dropped_params(self, site: SideSite) -> Params:
        """What stands at a block without a side block."""
        return {}

    def rung(self, p: Bound, s: Tensor, h: Tensor) -> Tensor:
        """The side block's input. Shapes: s (B, T, d / r), h (B, T, d) -> (B, T, d / r)."""
        return s

    def top_params(self, site: SideSite) -> Params:
        """The end's tensors; a memory has a norm alone."""
        shape, ends = site.shape, site.role == "top"
        return norm_params(shape, "norm_top") | (linear_params("top", shape.width, shape.outer) if ends else {})

    def top(self, p: Bound, s: Tensor, h: Tensor) -> Tensor:
        """W drop(norm(s)) + b. Shapes: s (B, T, d / r), h (B, T, d), the tower's own output -> (B, T, d)."""
        s = drop(norm(p, "norm_top", s), self.dropout if p.training else 0.0)
        return linear(p, "top", s) if "top" in p else s

    @property
    def quiet(self) -> bool:
        """Whether the backbone's dropout is off."""
        return self.backbone_eval and self.compat == "paper"

    # how it is built

    def install(self, build: Builder) -> None:
        anatomy, name = build.anatomy, type(self).__name__
        if self.norms != "none":
            raise MethodError(f"{name} sends no gradient into the backbone: norms='{self.norms}' would never train.",
                              "Set norms='none'.")
        for tower in anatomy.towers:
            if tower.grid:
                raise MethodError(f"{name} cannot go on {anatomy.model_type}: its token grid changes between stages, "
                                  "and the ladder has one width.", "Use a method that adds to a module's output.")
        shapes = read_shapes(anatomy, build.module, self.reduction)
        walk = Walk(anatomy, build.module, shapes, official=self.compat == "official")
        both = {"encoder", "decoder"} <= {t.name for t in anatomy.towers}
        for tower in anatomy.towers:
            self._tower(build, tower, shapes, walk, "memory" if both and tower.name == "encoder" else "top")

    def _tower(self, build: Builder, tower: Tower, shapes: dict[tuple[str, int], Shape], walk: Walk, end: str) -> None:
        def slot(role: str, path: str, params: Params, block: int | None = None, kind: str = "") -> None:
            if self.start != "random":
                params = walk.start(params, tower.name, block)
            build.slot(self, site(role, path, block), kind or role, params)

        def site(role: str, path: str, block: int | None = None) -> SideSite:
            return SideSite(tower.name, block, role, path, tower.width, tower.width,
                            shape=shapes[tower.name, len(tower.blocks) - 1 if block is None else block])

        kept, host = self.kept(tower), build.module(tower.path)
        slot("tower", tower.path, {})
        hook_with(host, _enter, pre=True)
        if _leave not in host._forward_hooks.values():
            host.register_forward_hook(_leave, with_kwargs=True, always_call=True)
        slot("start", tower.blocks[0], linear_params("weight", tower.width, shapes[tower.name, 0].width))
        for index, path in enumerate(tower.blocks):
            here = site("block", path, index)
            if index in kept:
                slot("block", path, self.rung_params(here) | block_params(here.shape, index == kept[0]), index)
            elif dropped := self.dropped_params(here):
                slot("dropped", path, dropped, index)
            if index in kept or index == 0:
                hook_with(build.module(path), _step)
        slot(end, tower.final, self.top_params(site(end, tower.final)), kind="top")
        hook_with(build.module(tower.final), _top)

    @property
    def needs_data(self) -> bool:
        return self.start == "fisher"

    @torch.no_grad()
    def calibrate(self, delta: Any, batches: Iterable[dict[str, Any]]) -> None:
        """Start the side blocks from the rows and columns with the largest Fisher information of these examples."""
        if not self.needs_data:
            return
        model: nn.Module = delta.model
        with delta.disabled():
            found = fisher(model, batches, self.samples)
        slots = [slot for _, slot in delta.slots if slot.method is self]
        shapes = read_shapes(delta.anatomy, model.get_submodule, self.reduction)
        parameters = dict(model.named_parameters())
        walk = Walk(delta.anatomy, model.get_submodule, shapes, {id(parameters[n]): v for n, v in found.items()},
                    self.compat == "official")
        for slot in slots:
            for name, parameter in slot._parameters.items():
                if parameter is not None and walk.has(slot.site.tower, slot.site.block, name):
                    parameter.copy_(walk.value(slot.site.tower, slot.site.block, name))


# how it runs. What goes from hook to hook is in the plan's carry: under (delta, tower) the side state, under
# (tower) the caller's grad mode and the modules whose dropout is off.


def _enter(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("tower")
    if not slots:
        return
    if slots[0].training:  # else model.eval() came behind the interrupt
        _restore(insert.plan, slots[0].site.tower)
    quiet = [] if not any(slot.method.quiet for slot in slots) else [
        m for m in tower.modules() if m.training and not (isinstance(m, Slot) and isinstance(m.method, Side))]
    for module in quiet:
        module.__dict__["training"] = False  # Module.__setattr__ takes longer than the walk
    insert.plan.put(f"side/{slots[0].site.tower}", (torch.is_grad_enabled(), quiet))
    _set_grad(False)


def _restore(plan: Plan, tower: str) -> None:
    """The modes as the tower was called in; a KeyboardInterrupt runs no hook, and the next forward finds them."""
    grad, quiet = plan.take(f"side/{tower}", (None, ()))
    for module in quiet:
        module.__dict__["training"] = True
    if grad is not None:
        _set_grad(grad)


def _leave(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Runs when the tower raised as well."""
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    for name, slot in insert.named("tower"):
        here = slot.site.tower
        _restore(insert.plan, here)
        for key in ("state", "bias"):
            insert.plan.take(f"side/{name}/{here}/{key}")
        memory = insert.plan.peek(f"side/{name}/memory")
        if here == "decoder" and memory is not None and memory.requires_grad:  # generation reads it again
            insert.plan.take(f"side/{name}/memory")


def _step(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    insert: Insert = block._modules[CHILD]  # type: ignore[assignment]
    plan = insert.plan
    for name, slot in insert.named("start"):
        x = first(args, kwargs).detach()
        _refuse_cache(named(block, args, kwargs), x.shape[1], type(slot.method).__name__)
        with _callers_mode(plan, slot.site.tower):
            p, side = slot.bind(x), slot.method
            x = drop(x, side.dropout if p.training and side.quiet else 0.0)  # else the backbone's own is on
            plan.put(f"side/{name}/{slot.site.tower}/state", linear(p, "weight", x))
    for name, slot in insert.named("block"):
        h = (out[0] if isinstance(out, tuple) else out).detach()
        key = f"side/{name}/{slot.site.tower}"
        with _callers_mode(plan, slot.site.tower):
            p, side = slot.bind(h, block), slot.method
            call = named(block, args, kwargs)
            s = side.rung(p, plan.take(f"{key}/state"), h)
            if "table" in p:
                plan.put(f"{key}/bias", relative_bias(p, s.shape[1], s.shape[1]))
            masks: Masks = _mask(call.get("attention_mask"), h), _mask(call.get("encoder_attention_mask"), h)
            memory = _memory(plan, name, slot, call)
            plan.put(f"{key}/state", side_block(p, s, masks, memory, plan.peek(f"{key}/bias"), side.dropout))


def _top(final: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    insert: Insert = final._modules[CHILD]  # type: ignore[assignment]
    for name, slot in insert.named("top"):
        y, tower = out[0] if isinstance(out, tuple) else out, slot.site.tower
        with _callers_mode(insert.plan, tower):
            s = insert.plan.take(f"side/{name}/{tower}/state")
            result = slot.method.top(slot.bind(y), s, y.detach())
        if slot.site.role == "memory":
            insert.plan.put(f"side/{name}/memory", result)
            continue
        _set_grad(insert.plan.peek(f"side/{tower}", (torch.is_grad_enabled(), ()))[0])  # what follows is behind it
        result = result.to(y.dtype)
        out = (result, *out[1:]) if isinstance(out, tuple) else result
    return out


def _set_grad(on: bool) -> None:
    if torch.is_grad_enabled() != on:
        torch.set_grad_enabled(on)


def _callers_mode(plan: Plan, tower: str) -> AbstractContextManager[Any]:
    """The grad mode in which the tower was called."""
    on = plan.peek(f"side/{tower}", (torch.is_grad_enabled(), ()))[0]
    return nullcontext() if torch.is_grad_enabled() == on else torch.set_grad_enabled(on)


def _mask(mask: Any, h: Tensor) -> Tensor | None:
    """A block's own mask, as booleans or an additive float, or None where nothing is masked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise MethodError(f"a side network reads attention masks of four axes, and the block got "
                          f"{f'one of {mask.dim()}' if isinstance(mask, Tensor) else type(mask).__name__}.",
                          "Load the model with attn_implementation='sdpa' or 'eager'.")
    mask = mask[:, :1]
    return mask.to(h.dtype) if mask.is_floating_point() else mask.bool()


def _memory(plan: Plan, name: str, slot: Slot, call: dict[str, Any]) -> Tensor | None:
    """The side encoder's end, for a decoder block that attends to the encoder; beams repeat their example."""
    states = call.get("encoder_hidden_states")
    if states is None or "cross" not in slot.site.shape.attention:  # type: ignore[attr-defined]
        return None
    memory = plan.peek(f"side/{name}/memory")
    if memory is None or memory.shape[1] != states.shape[1] or states.shape[0] % memory.shape[0]:
        raise MethodError("the side decoder attends to the side encoder, which did not run on this input.",
                          "Call the model with the encoder's own input, not with encoder_outputs of before.")
    return memory.repeat_interleave(states.shape[0] // memory.shape[0], 0)


def _refuse_cache(call: dict[str, Any], tokens: int, who: str) -> None:
    """A cache that holds more than this call's tokens stands for hidden states the side network never saw."""
    cache = call.get("cache") if call.get("cache") is not None else call.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and int(cache.get_seq_length()) > tokens:
        raise MethodError(f"{who} has no cache of its own: its side network must see the whole sequence at each step.",
                          "Call generate(..., use_cache=False).")


HOOKS = (_enter, _leave, _step, _top)
