"""Linear maps run sparse: the same numbers, only where a measurement says so, and the very modules come back."""
from copy import deepcopy

import pytest
import torch
from torch import nn

from slimtune.compress import sparse_linear
from slimtune.compress.latency import Latency, Spread
from slimtune.compress.sparse_linear import SparseLinear, desparsify, sparsify
from slimtune.errors import SlimtuneError
from slimtune.testing import batch, output, tiny


def says(**gains: float):
    """A measurement that runs every contender once and then reports these gains."""

    def measure(calls, **_):
        for call in calls.values():
            call()
        spread = {name: Spread(1.0, 1.0, 1.0) for name in calls}
        return Latency(spread, spread, {name: gains.get(name, 1.0) for name in calls}, {}, 1)

    return measure


@pytest.fixture
def model():
    """A BERT of which one map in four is left dense, one is empty in whole blocks, the others at random."""
    net, g = tiny("bert"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, linear in enumerate(m for m in net.modules() if isinstance(m, nn.Linear)):
            if number % 4 == 1:
                linear.weight *= torch.rand(linear.weight.shape, generator=g) < 0.1
            if number % 4 == 2:
                tiles = torch.rand([n // 4 for n in linear.weight.shape], generator=g) < 0.2
                linear.weight *= tiles.repeat_interleave(4, 0).repeat_interleave(4, 1)
            if number % 4 == 3:
                linear.weight.zero_()
    return net


def test_what_a_measurement_favours_runs_sparse_and_gives_the_same(model):
    inputs, before = batch("bert"), dict(model.named_modules())
    with torch.no_grad():
        told = output(model, inputs)
        report = sparsify(model, tokens=7, batch=3, measure=says(csr=1.5, bsr4=2.0, bsr16=1.2))
        now = output(model, inputs)
        twin = output(deepcopy(model), inputs)
    by_form = {form: [layer.path for layer in report.layers if layer.form == form] for form in ("dense", "csr", "bsr4")}
    assert len(report.layers) == 14
    assert {path for path, m in model.named_modules() if isinstance(m, SparseLinear)} == {
        layer.path for layer in report.switched}
    assert len(by_form["dense"]) == 4  # 0, 4, 8, 12
    assert len(by_form["csr"]) == 4
    assert len(by_form["bsr4"]) == 6
    assert all("50%" in layer.why for layer in report.layers if layer.form == "dense")
    assert report.rows == 21
    assert not torch.equal(now, told) or report.switched
    torch.testing.assert_close(now, told, rtol=0, atol=1e-5)
    assert torch.equal(twin, now)
    assert f"{len(report.switched)} of 14 linear maps run sparse" in str(report)
    assert desparsify(model) == len(report.switched)
    assert all(module is before[path] for path, module in model.named_modules())
    with torch.no_grad():
        assert torch.equal(output(model, inputs), told)


def test_what_gains_nothing_stays(model):
    before = dict(model.named_modules())
    report = sparsify(model, measure=says(csr=1.09, bsr4=0.5))
    assert not report.switched
    assert {"csr", "bsr4"} <= {form for layer in report.layers for form in layer.speedup}
    assert all(module is before[path] for path, module in model.named_modules())


def test_a_form_with_other_numbers_is_refused(model, monkeypatch):
    wrong = lambda weight: {"csr": (weight * 1.0001).to_sparse_csr()}  # noqa: E731
    monkeypatch.setattr(sparse_linear, "_forms", wrong)
    report = sparsify(model, measure=says(csr=9.0))
    told = [layer for layer in report.layers if layer.why.startswith("csr differs by")]
    assert len(told) == 7  # maps of zeros alone have a bias, and no difference
    assert {layer.density for layer in report.switched} == {0.0}


def test_every_layer_is_measured_for_real(model):
    report = sparsify(model, tokens=4)
    assert all((layer.milliseconds or 0) > 0 and layer.speedup["csr"] > 0 for layer in report.layers if not layer.why)


def test_no_gradient_is_lost_in_silence(model):
    sparsify(model, measure=says(csr=2.0))
    with pytest.raises(SlimtuneError, match="gives no gradient"):
        output(model, batch("bert"))


def test_hooked_maps_and_other_devices_are_left():
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight.data.zero_()
    handle = net[0].register_forward_hook(lambda *_: None)
    assert sparsify(net, measure=says(csr=9.0)).layers[0].why == "something is attached to it"
    handle.remove()
    assert sparsify(net, measure=says(csr=9.0)).switched
    with pytest.raises(SlimtuneError, match="on meta"):
        sparsify(nn.Linear(2, 2, device="meta"))
    with pytest.raises(SlimtuneError, match="nothing to measure"):
        sparsify(net, tokens=0)
