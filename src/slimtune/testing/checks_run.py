"""Checks of running: batches, modes, dtypes, copies, checkpointing, threads, the example axis."""
import copy
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from torch import Tensor, nn

from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.load import load_delta
from slimtune.core.switch import deltas
from slimtune.testing.case import (
    Case,
    Skip,
    check,
    close,
    error,
    gradients,
    identical,
    outline,
    run,
    same,
    scramble,
    train,
    values,
)
from slimtune.testing.tiny import batch, doubled, kind, loss, output


def one(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: v[i:i + 1] for k, v in inputs.items()}


def rows(case: Case, out: Tensor, i: int) -> Tensor:
    """The output of one example; CLIP's holds the texts' embeddings and then the images'."""
    size = next(iter(case.inputs.values())).shape[0]
    return out.view(-1, size, *out.shape[1:])[:, i] if kind(case.backbone) == "clip" else out[i:i + 1]


@check()
def batch_size_invariance(case: Case) -> None:
    """Each example alone gives what it gives in a batch, to 1e-5."""
    model, _ = case.moved()
    whole = run(model, case.inputs)
    for i in range(next(iter(case.inputs.values())).shape[0]):
        close(run(model, one(case.inputs, i)), rows(case, whole, i), f"example {i} alone and in its batch")


@check()
def padding_changes_nothing(case: Case) -> None:
    """A padded example gives what it gives without its padding, to 1e-5."""
    if "attention_mask" not in case.inputs:
        raise Skip("images are not padded")
    padded = one(case.inputs, case.inputs["input_ids"].shape[0] - 1)
    length, width = int(padded["attention_mask"].sum()), padded["input_ids"].shape[1]
    cut = {k: v[:, :length] if v.dim() == 2 and v.shape[1] == width else v for k, v in padded.items()}

    def gap(model: nn.Module) -> float:
        short, long = run(model, cut), run(model, padded)
        return error(long[:, :length] if long.dim() == 3 else long, short)

    if gap(case.base()) > 1e-5:
        raise Skip("the backbone's own output depends on its padding")
    model, _ = case.moved()
    found = gap(model)
    assert found <= 1e-5, f"with and without padding: relative error {found:.2e}, allowed 1e-05"


@check()
def dropout_is_off_in_eval(case: Case) -> None:
    """With dropout 0.5, two evaluations are bitwise equal and two training forwards differ."""
    if "dropout" not in type(case.method).model_fields:
        raise Skip("the method has no dropout")
    model, delta = case.attached(dropout=0.5)
    scramble(delta)
    torch.manual_seed(1)
    first = run(model, case.inputs)
    torch.manual_seed(2)
    assert torch.equal(run(model, case.inputs), first), "two evaluations differ"
    model.train()
    torch.manual_seed(1)
    trained = run(model, case.inputs)
    torch.manual_seed(2)
    assert not torch.equal(run(model, case.inputs), trained), "dropout does nothing in training"
    torch.manual_seed(1)
    assert torch.equal(run(model, case.inputs), trained), "the same random state gives another dropout"


@check()
def runs_in_inference_mode(case: Case) -> None:
    """torch.inference_mode() gives the output of no_grad(), bitwise, and training works after it."""
    model, delta = case.moved()
    own = run(model, case.inputs)
    with torch.inference_mode():
        assert torch.equal(output(model, case.inputs), own), "the output in inference mode differs"
    loss(model, case.inputs).backward()
    assert any(bool(g.any()) for g in gradients(delta).values()), "no gradient after a forward in inference mode"


@check()
def other_dtypes(case: Case) -> None:
    """It runs and trains on a float64 and a bfloat16 backbone, whose dtype the output keeps."""
    for dtype in (torch.float64, torch.bfloat16):
        model = case.base().to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs.items()}
        plain = run(model, inputs)
        delta = attach(model, case.method)
        start = run(model, inputs)
        assert start.dtype == dtype, f"on a {dtype} backbone the output is {start.dtype}"
        if case.method.starts_as_identity():
            assert torch.equal(start, plain), f"no identity in {dtype}"
        loss(model, inputs).backward()
        grads = gradients(delta).values()
        assert all(bool(g.isfinite().all()) for g in grads), f"a gradient is not finite in {dtype}"
        assert any(bool(g.any()) for g in grads), f"no gradient in {dtype}"


@check()
def follows_the_model(case: Case) -> None:
    """After model.to(float64) it runs in float64, equal to 1e-5; so does the backbone, disabled and detached."""
    model, delta = case.moved()
    own = run(model, case.inputs)
    model.to(torch.float64)
    inputs = doubled(case.inputs)
    moved = run(model, inputs)
    close(moved, own, "the output after model.to(float64)")
    with tempfile.TemporaryDirectory() as home:
        delta.save(Path(home) / "delta")
        other = case.base().double()
        load_delta(other, Path(home) / "delta")
        assert torch.equal(run(other, inputs), moved), "saved after model.to(float64), it loads as something else"
    with delta.disabled():
        close(run(model, inputs), case.plain, "the backbone's output after model.to(float64)")
    delta.detach()
    close(run(model, inputs), case.plain, "the backbone's output after model.to(float64) and detach()")


@check()
def deepcopy_is_independent(case: Case) -> None:
    """A deep copy gives the same output; training and detaching it leave the original as it was."""
    model, delta = case.moved()
    _copied(case, model, delta, copy.deepcopy(model))


@check()
def pickle_round_trip(case: Case) -> None:
    """The whole model survives pickling, with its delta."""
    model, delta = case.moved()
    _copied(case, model, delta, pickle.loads(pickle.dumps(model)))


def _copied(case: Case, model: nn.Module, delta: Delta, twin: nn.Module) -> None:
    own, state, before = run(model, case.inputs), values(delta), outline(model)
    assert torch.equal(run(twin, case.inputs), own), "the copy gives another output"
    other = deltas(twin)[delta.name]
    assert other is not delta, "the copy has the original's delta"
    assert other.model is twin, "the copy's delta is not on the copy"
    shared = {id(t) for t in delta.tensors().values()} & {id(t) for t in other.tensors().values()}
    assert not shared, "the copy shares tensors with the original"
    train(twin, other, case.inputs, 2, lr=1e-2)
    assert not torch.equal(run(twin, case.inputs), own), "training the copy does not change its output"
    same(values(delta), state, "the original's delta after training the copy")
    assert torch.equal(run(model, case.inputs), own), "training the copy changed the original's output"
    other.detach()
    assert torch.equal(run(twin, case.inputs), case.plain), "detached, the copy is not the backbone"
    assert outline(model) == before, "detaching the copy changed the original"
    assert torch.equal(run(model, case.inputs), own), "detaching the copy changed the original's output"


@check()
def gradient_checkpointing(case: Case) -> None:
    """Checkpointing gives the same gradients to 1e-5, with use_reentrant both True and False."""
    model, delta = case.moved()
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise Skip("the backbone has no gradient checkpointing")
    model.train()
    torch.manual_seed(3)
    loss(model, case.inputs).backward()
    wanted = gradients(delta)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for reentrant in (False, True):
        model.zero_grad(set_to_none=True)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})  # type: ignore[operator]
        torch.manual_seed(3)  # dropout is replayed
        loss(model, case.inputs).backward()
        found = gradients(delta)
        gap = max((float((found[n] - g).abs().max()), n) for n, g in wanted.items())
        assert gap[0] <= 1e-5 * scale, f"use_reentrant={reentrant}: {gap[1]} differs by {gap[0]:.2e} of {scale:.2e}"


@check()
def threads_do_not_mix(case: Case) -> None:
    """Two threads that call the model at once get what they get alone."""
    model, _ = case.moved()
    calls = [case.inputs, batch(case.backbone, size=2, seed=5, tokens=9)]
    alone = [run(model, c) for c in calls]
    gate = Barrier(2)

    def call(i: int) -> bool:
        gate.wait()
        return all(identical(run(model, calls[i]), alone[i]) for _ in range(3))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(call, range(2))), "called from two threads at once, an output differs"


@check()
def example_axis(case: Case) -> None:
    """Parameters with a leading example axis, [B, ...], give the output of those without."""
    model, delta = case.moved()
    own = run(model, case.inputs)
    modules = [*delta.shared.values(), *(slot for _, slot in delta.slots)]
    if not any(m._parameters for m in modules):
        raise Skip("it trains the backbone's own tensors, which have no example axis")
    if any(tower.grid for tower in delta.anatomy.towers):
        raise Skip("windows of one image are a batch of their own")
    if case.backbone == "deberta-v2" and any(slot.site.role in ("attn.q", "attn.k") for _, slot in delta.slots):
        raise Skip("its query and key projections also run on positions that all examples share")
    size = next(iter(case.inputs.values())).shape[0]
    for module in modules:
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().expand(size, *p.shape).clone(), p.requires_grad)
    try:
        with torch.no_grad():
            out = output(model, case.inputs)
    except Exception as problem:
        raise AssertionError(f"with an example axis it fails: {type(problem).__name__}: {problem}") from problem
    close(out, own, "the output with an example axis")
