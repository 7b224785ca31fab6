"""shrink: a model whose heads, neurons, ranks and blocks are gated away becomes one that no longer has them.

    fold the gates (and what else is attached) into the weights  ->  slice what no weight reads  ->  compare

A head is gone when every column of the output projection that reads it is 0, a neuron when its column of the
down-projection is, a rank when either factor is 0 there. So what a gate, a mask or a merged delta made 0 is found
alike, the slicing changes no result, and a comparison with the model before it can say so. Hidden dimensions go by
their gates alone, or by name: a norm over what lives is another norm, and zeros in weights do not ask for it.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.core import Anatomy, Delta, base_parameters, deltas, dissect
from slimtune.core.insert import CHILD, Root
from slimtune.core.merge import merged
from slimtune.core.switch import set_active
from slimtune.errors import DeltaError, MethodError, SiteError, SlimtuneError, listing, suggest
from slimtune.sparsity.edits import Edits
from slimtune.sparsity.hidden import coefficients, cut_hidden, only
from slimtune.sparsity.idle import idle_blocks
from slimtune.sparsity.kept import ROLES, Keep, alive, chosen
from slimtune.sparsity.macs import count_macs
from slimtune.sparsity.parts import Factored
from slimtune.sparsity.probe import outputs, probe
from slimtune.sparsity.slicing import blocks_of, cut_blocks, cut_heads, cut_neurons, cut_shared
from slimtune.sparsity.target import check_norms, is_hidden_gate

TINY = torch.finfo(torch.float32).tiny
"""Numbers below it are subnormal, and slow."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did.

    heads, neurons: how many are left, by site; ranks: of maps of low rank, by path; blocks: by tower; hidden: by tower,
    where dimensions of the stream were cut.
    parameters, macs: (before, after), macs of so many `tokens`, None where they cannot be counted.
    difference: the largest one between the outputs before and after, as a share of the largest output.
    """

    heads: dict[str, int] = field(default_factory=dict)
    neurons: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    hidden: dict[str, int] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] | None = None
    tokens: int = 128
    difference: float = 0.0

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"parameters {before:,} -> {after:,} ({after / before:.1%})"]
        if self.macs is not None:
            before, after = self.macs
            lines.append(f"MACs of {self.tokens} tokens {before:,} -> {after:,} ({after / before:.1%})")
        for what in ("blocks", "hidden", "heads", "neurons", "ranks"):
            if kept := getattr(self, what):
                lines.append(f"{what} " + " ".join(f"{name}={number}" for name, number in kept.items()))
        return "\n".join([*lines, f"largest difference {self.difference:.1e} of the largest output"])


def shrink(model: nn.Module, keep: Keep | None = None, layers: Sequence[int] | Mapping[str, Sequence[int]] = (), *,
           inputs: Mapping[str, Any] | Tensor | None = None) -> Shrunk:
    """Fold the active deltas into the model and slice out, in place, all heads, neurons and ranks that are 0.

    keep: what is kept, by site (`encoder.0.attn.heads`, `encoder.0.mlp.act`) or of the residual stream
    (`encoder.hidden`): indices or booleans; the others go whatever their weights are. Dimensions of the stream whose
    gates are 0 go too, and its norms are then over the others; what leaves a bare backbone is narrower.
    layers: blocks to drop whole, counted in each tower or by tower, negative from the end.
    inputs: a batch on which the model is compared with what it was; by default a random one.
    A trained head stays; deltas are detached, for they do not fit any more.
    Errors: MethodError for what cannot be merged or sliced, or when the outputs differ by more than 1e-5 of the
    largest, or than they are rounded in the model's dtype; DeltaError for deltas that are attached and do not run; the
    model is then as it was.
    Example:
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> shrink(model, keep={"encoder.0.attn.heads": [0, 2], "encoder.1.mlp.act": range(8)}).parameters
        (23587, 17851)
    """
    root = model._modules.get(CHILD)
    active = _running(model, root)
    anatomy = (root.anatomy if isinstance(root, Root) else None) or dissect(model)
    wanted, dropped = chosen(anatomy, keep), _by_tower(anatomy, layers)
    stream = wanted.pop(f"{anatomy.towers[0].name}.hidden", None)
    c = coefficients(model, anatomy, active, stream)
    if c is not None:
        check_norms(active)
    batch = probe(model) if inputs is None else inputs
    before = _size(model, anatomy)
    with _without(model, anatomy, wanted, dropped), only(model, anatomy, None if stream is None else c):
        told = outputs(model, batch)
    edits = Edits()
    try:
        _fold(edits, model, anatomy, active)
        if c is not None:
            cut_hidden(edits, model, anatomy, c, batch)
        kept = _cut(edits, model, anatomy, wanted, dropped)
        lives = None if c is None else c.nonzero().flatten()
        difference = _compare(told, outputs(model, batch), model, anatomy.model_type, lives)
    except BaseException as error:
        edits.undo()
        if isinstance(root, Root):
            set_active(root, tuple(d.name for d in active))
        if isinstance(error, SlimtuneError) or not isinstance(error, Exception):
            raise
        raise MethodError(f"a sliced {anatomy.model_type} does not run: {type(error).__name__}: {error}",
                          "The model is as it was. Cut neurons only, or another family.") from error
    _detach(model, active)
    after = _size(model, dissect(model))
    macs = None if before[1] is None or after[1] is None else (before[1], after[1])
    if lives is not None and c is not None and len(lives) < len(c):
        kept["hidden"] = {anatomy.towers[0].name: len(lives)}
    return Shrunk(**kept, parameters=(before[0], after[0]), macs=macs, difference=difference)


def _running(model: nn.Module, root: nn.Module | None) -> list[Delta]:
    found = deltas(model)
    if not isinstance(root, Root):
        return []
    if folded := [d.name for d in found.values() if d.merged]:
        raise DeltaError(f"delta '{folded[0]}' is merged.", "Call unmerge() first: shrink folds it in by itself.")
    if idle := [name for name in found if name not in root.plan.active]:
        raise DeltaError(f"deltas are attached that do not run, and would not fit a smaller model: {listing(idle)}.",
                         "Save and detach them first, or make them active.")
    if root.plan.weights:
        raise DeltaError("deltas that are averaged cannot be folded in.", "Make one with average(), or activate one.")
    return [found[name] for name in root.plan.active]


def _by_tower(anatomy: Anatomy, layers: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, set[int]]:
    """The blocks to drop of each tower, counted from 0."""
    found: dict[str, set[int]] = {}
    for tower in anatomy.towers:
        depth = len(tower.blocks)
        blocks = layers.get(tower.name, ()) if isinstance(layers, Mapping) else layers
        if bad := [b for b in blocks if not -depth <= b < depth]:
            raise SiteError(f"shrink: layers name block {bad[0]} of the {tower.name}, which has {depth}.",
                            "Set layers, for each tower if they differ: {'encoder': [0]}.")
        found[tower.name] = {b % depth for b in blocks}
    if isinstance(layers, Mapping) and (odd := [name for name in layers if name not in found]):
        raise SiteError(f"shrink: layers name the tower '{odd[0]}', which {anatomy.model_type} does not have.",
                        f"It has: {listing(found)}", suggest(odd[0], found))
    return found


def _size(model: nn.Module, anatomy: Anatomy) -> tuple[int, int | None]:
    try:
        macs = count_macs(model, Shrunk.tokens, anatomy=anatomy).total
    except SlimtuneError:
        macs = None
    return sum(p.numel() for p in base_parameters(model).values()), macs


@contextmanager
def _without(model: nn.Module, anatomy: Anatomy, wanted: Mapping[str, Tensor],
             dropped: Mapping[str, set[int]]) -> Iterator[None]:
    """The model as it is to be, by hooks: what is not kept multiplied by 0, dropped blocks passed by."""
    sites = {s.name: s for s in anatomy.sites}
    with ExitStack() as stack:
        for name, mask in wanted.items():
            gate = mask.repeat_interleave(sites[name].d_out // len(mask))
            host = model.get_submodule(sites[name].path)
            stack.callback(host.register_forward_pre_hook(_times(gate)).remove)
        for path in (anatomy.tower(tower).blocks[b] for tower, blocks in dropped.items() for b in blocks):
            stack.callback(model.get_submodule(path).register_forward_hook(_pass, with_kwargs=True).remove)
        yield


def _times(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (args[0] * gate.to(args[0]), *args[1:])


def _pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    came = args[0] if args else kwargs["hidden_states"]
    return (came, *out[1:]) if isinstance(out, tuple) else came


def _fold(edits: Edits, model: nn.Module, anatomy: Anatomy, active: Sequence[Delta]) -> None:
    """Let the merged values stand in the model, and the deltas rest."""
    if active:
        set_active(active[0].root, ())
        for own in (own for delta in active for own in delta.owned):
            for module, name in own.places:
                edits.parameter(module, name, own.value)
        every = SimpleNamespace(model=model, anatomy=anatomy, owned=[], masks={},
                                slots=[item for delta in active for item in delta.slots if not is_hidden_gate(item[1])])
        for module, name, value in merged(cast(Delta, every), zeros="fill"):
            edits.tensor(module, name, value)
    flushed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None or not p.is_floating_point() or not bool(((p != 0) & (p.abs() < TINY)).any()):
                continue
            if id(p) not in flushed:  # tied tensors stay tied
                flushed[id(p)] = nn.Parameter(p.detach().masked_fill(p.abs() < TINY, 0), p.requires_grad)
            edits.parameter(module, name, flushed[id(p)])


def _cut(edits: Edits, model: nn.Module, anatomy: Anatomy, wanted: Mapping[str, Tensor],
         dropped: Mapping[str, set[int]]) -> dict[str, Any]:
    """All slices; how many of everything are left."""
    counts: dict[str, dict[str, int]] = {"heads": {}, "neurons": {}, "blocks": {}}
    blocks = {at: block for at, block in blocks_of(anatomy).items() if at[1] not in dropped[at[0]]}
    sites = [block[role] for block in blocks.values() for role in ROLES if role in block]
    kept = {site.name: (alive(model, site) & wanted.get(site.name, torch.tensor(True))).nonzero().flatten()
            for site in sites}
    cut_shared(edits, model, anatomy, kept)
    for block in blocks.values():
        if (site := block.get("attn.heads")) is not None:
            counts["heads"][site.name] = len(kept[site.name])
            cut_heads(edits, model, anatomy, block, kept[site.name])
        if (site := block.get("mlp.act")) is not None:
            counts["neurons"][site.name] = len(kept[site.name])
            cut_neurons(edits, model, block, kept[site.name])
    ranks, idle = _ranks(edits, model), idle_blocks(edits, model, anatomy, counts, dropped)
    for tower in anatomy.towers:
        gone = dropped[tower.name] | idle[tower.name]
        cut_blocks(edits, model, anatomy, tower.name, gone)
        counts["blocks"][tower.name] = len(tower.blocks) - len(gone)
    return {**counts, "ranks": ranks}


def _ranks(edits: Edits, model: nn.Module) -> dict[str, int]:
    left = {}
    for path, module in model.named_modules():
        if isinstance(module, Factored):
            lives = (module.up.weight != 0).any(0) & (module.down.weight != 0).any(1)
            kept = lives.nonzero().flatten()
            if len(kept) < len(lives):
                edits.columns(module.up, kept)
                edits.rows(module.down, kept)
            left[path] = len(kept)
    return left


def _compare(told: Mapping[str, Tensor], now: Mapping[str, Tensor], model: nn.Module, family: str,
             lives: Tensor | None) -> float:
    """The largest difference; of a stream that was cut, at the dimensions that live.

    An output is as exact as the coarsest numbers that it was computed of: a loss in float32 as logits in bfloat16. A
    single number, a loss, is off by as much as what it was computed of, so its scale is that of the largest output.
    """
    pairs = {}
    for name, old in told.items():
        new = now.get(name)
        if lives is not None and new is not None and new.shape == (*old.shape[:-1], len(lives)) != old.shape:
            old = old[..., lives]
        if new is None or new.shape != old.shape:
            raise MethodError(f"a sliced {family} gives another '{name}': {None if new is None else tuple(new.shape)}.")
        pairs[name] = old, new
    largest = {name: float(old.abs().max()) for name, (old, _) in pairs.items()}
    worst, exact = 0.0, _rounding(p.dtype for p in base_parameters(model).values())
    for name, (old, new) in pairs.items():
        scale = (largest[name] if old.dim() else max(largest.values())) or 1.0
        difference, limit = float((new - old).abs().max()) / scale, max(TOLERANCE, exact, _rounding([old.dtype]))
        if not difference <= limit:
            raise MethodError(f"a sliced {family} differs from the gated one: {name} by {difference:.1e} of "
                              f"{'its' if old.dim() else 'the'} largest value, and {limit:.0e} is allowed.",
                              "The model is as it was.")
        worst = max(worst, difference)
    return worst


def _rounding(dtypes: Iterable[torch.dtype]) -> float:
    """What the coarsest of these numbers may be off by, behind some sums; 0 for none. Numbers of a byte are scaled."""
    return max((16 * torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize > 1), default=0.0)


def _detach(model: nn.Module, active: Sequence[Delta]) -> None:
    required = dict(active[0].root.required) if active else {}
    for delta in active:
        delta.detach()
    if active:
        for path, p in base_parameters(model).items():
            p.requires_grad_(required.get(path, True) and p.is_floating_point())
