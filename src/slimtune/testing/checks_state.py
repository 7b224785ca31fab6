"""Checks of state, files, merging, and of several deltas on one backbone."""
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from slimtune.core.add import Add
from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.fingerprint import bits_digest
from slimtune.core.load import load_delta
from slimtune.core.method import Method, to_config
from slimtune.core.side import Side
from slimtune.core.switch import activate, deltas
from slimtune.core.unfreeze import Unfreeze
from slimtune.errors import DeltaError, MethodError
from slimtune.testing.case import (
    Case,
    check,
    close,
    differences,
    gradients,
    outline,
    refused,
    run,
    same,
    scramble,
    train,
    values,
)
from slimtune.testing.tiny import loss


@check()
def state_round_trip(case: Case) -> None:
    """state() into load_state() is bitwise, and the outputs are."""
    model, delta = case.moved()
    other, target = case.attached()
    target.load_state(values(delta))
    same(values(target), values(delta), "the loaded state")
    assert torch.equal(run(other, case.inputs), run(model, case.inputs)), "the outputs differ"


@check()
def load_state_is_strict(case: Case) -> None:
    """load_state() refuses missing and extra names and other shapes, and then sets nothing."""
    model, delta = case.moved()
    before, own = values(delta), run(model, case.inputs)
    name = list(before)[-1]
    bad: dict[str, dict[str, Tensor]] = {
        "a missing name": {n: t + 1 for n, t in before.items() if n != name},
        "an extra name": {**{n: t + 1 for n, t in before.items()}, "no.such.tensor": torch.zeros(2)},
        "another shape": {**{n: t + 1 for n, t in before.items()}, name: torch.zeros(*before[name].shape, 2)},
    }
    for what, state in bad.items():
        with refused(DeltaError, what):
            delta.load_state(state)
        same(values(delta), before, f"the state after refusing {what}")
    assert torch.equal(run(model, case.inputs), own), "the output changed"


@check()
def save_and_load(case: Case) -> None:
    """A saved delta on a freshly built backbone gives bitwise equal outputs; the file has no pickle."""
    model, delta = case.moved()
    own, stored = run(model, case.inputs), delta.count().stored
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "delta"
        delta.save(folder)
        files = sorted(p.name for p in folder.iterdir())
        assert files == ["delta.json", "delta.safetensors"], f"the folder holds {files}"
        other = case.base()
        loaded = load_delta(other, folder)
        assert torch.equal(run(other, case.inputs), own), "the loaded delta gives another output"
        numbers = sum(t.numel() for t in loaded.state().values())
        assert numbers == stored, f"count().stored is {stored}, and the file holds {numbers}"
        again = Path(home) / "again"
        loaded.save(again)
        assert (again / files[1]).read_bytes() == (folder / files[1]).read_bytes(), "saved again, the file differs"
        assert [type(m) for m in loaded.methods] == [type(m) for m in case.method.parts()], "another method came back"


@check()
def other_base_is_refused(case: Case) -> None:
    """A delta does not load on another base, which is left as it was."""
    _, delta = case.moved()
    with tempfile.TemporaryDirectory() as home:
        delta.save(Path(home) / "delta")
        other = case.base(seed=1)
        before, digest = outline(other), bits_digest(other)
        with refused(DeltaError, "a base with other weights"):
            load_delta(other, Path(home) / "delta")
    assert not differences(before, outline(other)), f"changed at: {differences(before, outline(other))[:6]}"
    assert bits_digest(other) == digest, "the other base's bits changed"


def merges(method: Method) -> bool:
    """Whether a method claims a merge: it defines `weight` or `fold`, or trains the base's own tensors."""
    if isinstance(method, Add):
        return type(method).weight is not Add.weight or type(method).fold is not Add.fold
    return isinstance(method, Unfreeze)


@check()
def merges_as_claimed(case: Case) -> None:
    """merge() keeps the output to 1e-5 and unmerge() is bitwise, if the method claims it; else it is refused."""
    model, delta = case.moved()
    own = run(model, case.inputs)
    with delta.disabled():
        digest = bits_digest(model)
    if not merges(case.method):
        with refused(MethodError, "merging a method that names no change of weights"):
            delta.merge()
        assert torch.equal(run(model, case.inputs), own), "the refused merge changed the output"
        return
    try:
        delta.merge()
    except MethodError as refusal:
        if getattr(case.method, "merges_where", ""):
            case.notes.append(f"not mergeable here: {refusal.what}")
            assert torch.equal(run(model, case.inputs), own), "the refused merge changed the output"
            return
        raise AssertionError(f"it defines weight or fold, and merge() refuses: {refusal}") from None
    close(run(model, case.inputs), own, "the output after merge()")
    for what, call in (("merging twice", delta.merge), ("disabling a merged delta", delta.disabled().__enter__)):
        with refused(DeltaError, what):
            call()
    _reloads(case, delta, own)
    delta.unmerge()
    assert torch.equal(run(model, case.inputs), own), "the output after unmerge() is not bitwise the same"
    with delta.disabled():
        assert bits_digest(model) == digest, "the base's bits after unmerge() are not as before"


@check()
def two_deltas_are_isolated(case: Case) -> None:
    """Training one delta leaves the other's bits; each gives the output it gives alone."""
    model, a = case.moved("a")
    output_a, state_a = run(model, case.inputs), values(a)
    b = attach(model, case.method, "b", seed=1)
    scramble(b, 1)
    train(model, b, case.inputs, 2)
    output_b = run(model, case.inputs)
    same(values(a), state_a, "the other delta after training one")
    assert not torch.equal(output_a, output_b), "two different deltas give one output"
    alone, own = case.attached("b")
    own.load_state(values(b))
    assert torch.equal(run(alone, case.inputs), output_b), "beside another, the delta does not run as it does alone"
    a.activate()
    assert torch.equal(run(model, case.inputs), output_a), "switched back, the first delta gives another output"
    activate(model)
    assert torch.equal(run(model, case.inputs), case.plain), "with none active, the output is not the backbone's"
    b.detach()
    a.activate()
    assert torch.equal(run(model, case.inputs), output_a), "detaching one delta changed the other"
    assert list(deltas(model)) == ["a"], "the detached delta is still listed"


@check()
def joins_a_union(case: Case) -> None:
    """In a list with another method, both train, and the union saves and loads."""
    from slimtune.methods import get

    partner = get("lora")(rank=1, head=case.method.head)
    model = case.base()
    if isinstance(case.method, Side):
        with refused(MethodError, "a union with a method below it, which would never train"):
            attach(model, [case.method, partner])
        return
    delta = attach(model, [case.method, partner])
    scramble(delta)
    own, state = run(model, case.inputs), values(delta)
    loss(model, case.inputs).backward()
    slots = delta.by_method()[-1][1]
    added = {n: g for n, g in gradients(delta).items() if delta.is_of(n, slots)}
    silent = [n for n, g in added.items() if not g.any()]
    assert len(added) == 2 * len(slots), f"LoRA's tensors are not all there: {list(added)[:6]}"
    assert not silent, f"beside it, LoRA does not train: {silent[:6]}"
    same(values(delta), state, "the union's values after a backward")
    _reloads(case, delta, own)


def _reloads(case: Case, delta: Delta, own: Tensor) -> nn.Module:
    with tempfile.TemporaryDirectory() as home:
        delta.save(Path(home) / "delta")
        other = case.base()
        loaded = load_delta(other, Path(home) / "delta")
    assert len(loaded.methods) == len(delta.methods), "the union came back with another number of methods"
    assert all(to_config(m)["name"] for m in loaded.methods)
    assert torch.equal(run(other, case.inputs), own), "the loaded union gives another output"
    return other
