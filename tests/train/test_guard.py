"""A run that trains nothing, in part or whole, fails at once and names the tensor."""
from typing import ClassVar

import pytest
import torch
from train_toys import SPEC, accuracy, attached, collate, rows, run

import slimtune as st
from slimtune.core import Add, ones, zeros
from slimtune.errors import MethodError, TrainError
from slimtune.testing import NAMES, batch, kind, tiny
from slimtune.train import Interrupted, TrainSpec, fit
from slimtune.train.guard import Finite, Guard

SHORT = TrainSpec(**{**SPEC.model_dump(), "steps": 3, "warmup": 0.0})


class Unused(Add):
    """y + a, and a parameter b that nothing reads."""

    sites: tuple[str, ...] = ("mlp.down",)

    def params(self, site):
        return {"a": zeros(site.d_out), "b": zeros(site.d_out)}

    def forward(self, p, x, y):
        return y + p["a"]


class Resting(Add):
    """y + u (v * y) with u = 0: v gets a gradient of 0 at first."""

    sites: tuple[str, ...] = ("mlp.down",)

    def params(self, site):
        return {"u": zeros(site.d_out), "v": ones(site.d_out)}

    def forward(self, p, x, y):
        return y + p["u"] * p["v"] * y


class Declared(Resting):
    silent: ClassVar[dict[str, str]] = {r"\.v$": "u is 0 at the start"}


def trained(method, tmp_path, **changes):
    return run(tmp_path, attached(method), SHORT.model_copy(update=changes))


def test_a_tensor_without_a_gradient(tmp_path):
    with pytest.raises(TrainError) as caught:
        trained(Unused(), tmp_path)
    assert "step 1: no gradient reaches encoder.0.mlp.down.unused.b encoder.1.mlp.down.unused.b." in str(caught.value)
    assert caught.value.exit_code == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("checkpoint")]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_tensor_whose_gradient_is_zero(tmp_path, decay):
    """Weight decay alone would move it; that is no training."""
    with pytest.raises(TrainError, match=r"step 1: the gradient of encoder.0.mlp.down.resting.v .* is 0 everywhere"):
        trained(Resting(), tmp_path, weight_decay=decay)


def test_one_that_the_method_declares_is_reported(tmp_path, caplog):
    caplog.set_level("INFO")
    delta, _ = trained(Declared(), tmp_path)
    assert "declared.v" in caplog.text
    assert "u is 0 at the start" in caplog.text
    assert any(bool((p != 1).any()) for name, p in delta.named_parameters() if name.endswith(".v"))


def test_the_check_waits_for_a_learning_rate_above_zero(tmp_path):
    """Warm-up begins at 0: nothing moves at step 1, and all is well."""
    _, result = trained(st.methods.LoRA(rank=2), tmp_path / "a", warmup=0.5)
    assert result.steps == 3
    with pytest.raises(TrainError, match="step 2: the gradient of"):
        trained(Resting(), tmp_path / "b", warmup=0.5)


def test_an_update_that_is_too_small(tmp_path):
    """Half-precision weights near 1 do not feel a small step; it is said once the rate is at its peak."""
    model = tiny("bert").to(torch.bfloat16)
    delta = st.attach(model, st.methods.NormTuning())
    spec = SHORT.model_copy(update={"learning_rate": 1e-6, "warmup": 0.5, "steps": 6})
    with pytest.raises(TrainError) as caught:
        fit(delta, rows(), None, collate, accuracy, spec, tmp_path)
    assert "LayerNorm.weight" in str(caught.value)
    assert "did not move, though there is a gradient" in str(caught.value)
    assert "bfloat16" in str(caught.value)
    assert "step 4" in str(caught.value)


def test_a_tiny_learning_rate_in_warm_up_is_no_error(tmp_path):
    """Float32 weights near 1 do not move by 1e-9 at first, and do later."""
    spec = SHORT.model_copy(update={"learning_rate": 1e-6, "warmup": 0.99, "steps": 400})
    guard = Guard(st.attach(tiny("bert"), st.methods.NormTuning()))
    guard.begin()
    params = list(guard.delta.parameters())
    optimizer = torch.optim.AdamW(params, lr=spec.learning_rate, weight_decay=0.0)
    for step in range(1, 401):
        guard.delta.model(**batch("bert")).loss.backward()
        for group in optimizer.param_groups:
            group["initial_lr"], group["lr"] = 1e-6, 1e-6 * (step - 1) / 400
        guard.before_step(step, optimizer)
        optimizer.step()
        guard.after_step(step)
        if not guard.waiting:
            break
    assert 2 < step < 400


def test_an_optimizer_without_the_tensor():
    delta = attached()
    guard = Guard(delta)
    guard.begin()
    delta.model(**batch("bert")).loss.backward()
    some = [p for name, p in delta.named_parameters() if not name.startswith("head.")]
    with pytest.raises(TrainError, match=r"the optimizer does not hold head.classifier"):
        guard.before_step(1, torch.optim.AdamW(some))


@pytest.mark.parametrize("name", [n for n in NAMES if kind(n) not in ("clip", "image")])
@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "houlsby", "prefix_tuning", "lst"])
def test_real_methods_pass(name, method):
    """The declared silences are enough on every text family: a false alarm would stop a good run."""
    try:
        delta = st.attach(tiny(name), st.methods.get(method)())
    except MethodError as error:
        pytest.skip(error.what)
    guard = Guard(delta)
    guard.begin()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-3)
    for step in (1, 2):
        delta.model.train()
        delta.model(**batch(name, size=4)).loss.backward()
        guard.before_step(step, optimizer)
        optimizer.step()
        guard.after_step(step)
    assert not guard.waiting


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, bad):
    delta = attached()
    calls = 0
    real = type(delta.model).forward

    def forward(self, **inputs):
        nonlocal calls
        calls += self.training
        out = real(self, **inputs)
        if calls == 5:                                      # accumulation 2: the first half of step 3
            out.loss = out.loss * bad
        return out

    monkeypatch.setattr(type(delta.model), "forward", forward)
    with pytest.raises(TrainError) as caught:
        run(tmp_path, delta, SHORT.model_copy(update={"steps": 4, "save_every": 1, "eval_every": 4}))
    assert f"step 3: the loss is {bad}" in str(caught.value)
    assert f"Last good checkpoint: {tmp_path / 'checkpoint-2'}" in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in delta.state().values())


def test_a_gradient_that_is_not_finite(tmp_path):
    delta = attached()
    p = dict(delta.named_parameters())["head.classifier.bias"]
    p.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainError, match="step 1: the norm of the gradient is nan") as caught:
        run(tmp_path, delta, SHORT)
    assert "No checkpoint had been saved" in str(caught.value)
    p2 = SHORT.model_copy(update={"clip": None})
    with pytest.raises(TrainError, match="step 1: the norm of the gradient is nan"):
        run(tmp_path, delta, p2)


def test_finite_takes_numbers(tmp_path):
    Finite(tmp_path).check(1.0, "loss", 1)
    Finite(tmp_path).check(None, "loss", 1)
    with pytest.raises(TrainError):
        Finite(tmp_path).check(float("inf"), "loss", 1)


def test_exit_codes():
    assert Interrupted("stopped").exit_code == 3
    assert TrainError("failed").exit_code == 1
