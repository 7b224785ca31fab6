"""check_method passes for every method on every backbone, and catches methods that break the contract."""
import time
from typing import ClassVar

import pytest
import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional as F

from slimtune.core import Add, Init, Unfreeze, normal, zeros
from slimtune.core import method as registry
from slimtune.core.insert import CHILD
from slimtune.errors import SiteError
from slimtune.methods import get, names
from slimtune.testing import NAMES, CheckFailure, check_method, small
from slimtune.testing.check import CHECKS

GRAPHS = ("compiles", "exports")


@pytest.mark.parametrize("backbone", NAMES)
@pytest.mark.parametrize("name", names())
def test_method_on_backbone(name: str, backbone: str):
    report = check_method(small(get(name)), [backbone])
    pair = report.pairs[backbone]
    assert pair.refusal or len(pair.passed) >= 25, report
    assert pair.refusal or set(pair.passed) | set(pair.skipped) == {c.name for c in CHECKS if not c.slow}


VARIANTS = [
    ("lora", {"dropout": 0.1, "rslora": True, "sites": ("attn.?", "mlp.up", "mlp.down")}, "gpt2"),
    ("lora", {"sites": ("mlp.act",)}, "bert"),
    ("prefix_tuning", {"hidden": 5}, "t5"),
    ("prefix_tuning", {"hidden": 5}, "llama"),
    ("prefix_tuning", {"positions": "before"}, "gpt2"),
    ("prefix_tuning", {"positions": "before"}, "t5"),
    ("prefix_tuning", {"positions": "before"}, "mistral"),
    ("prefix_tuning", {"positions": "before"}, "bart"),
    ("scaled_parallel_adapter", {"learned_scale": True}, "bart"),
    ("scaled_parallel_adapter", {"sites": ("attn",), "norms": "all"}, "vit"),
    ("bitfit", {"sites": ("attn.q", "mlp.up")}, "bert"),
    ("houlsby", {"compat": "official", "dropout": 0.1, "blocks": (-1,)}, "llama"),
    ("pfeiffer", {"head": "none"}, "bert"),
    ("gates", {"hidden": True}, "bert"),
    ("gates", {"hidden": True, "sites": ()}, "llama"),
    ("prompt_tuning", {"init": "normal", "towers": ("decoder",)}, "bart"),
    ("prompt_tuning", {"towers": ("vision", "text")}, "clip"),
]


@pytest.mark.parametrize(("name", "values", "backbone"), VARIANTS)
def test_other_configurations(name: str, values: dict, backbone: str):
    report = check_method(small(get(name), **values), [backbone])
    assert report.pairs[backbone].refusal is None


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5", "vit"])
@pytest.mark.parametrize("name", ["lora", "ia3", "houlsby", "prefix_tuning", "prompt_tuning", "lst"])
def test_graphs_of_the_main_methods(name: str, backbone: str):
    only = GRAPHS if backbone != "t5" else ("exports",)  # T5's compilation is among the slow ones
    pair = check_method(small(get(name)), [backbone], only=only).pairs[backbone]
    assert pair.passed == list(only)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", NAMES)
@pytest.mark.parametrize("name", names())
def test_graphs_of_every_method(name: str, backbone: str):
    pair = check_method(small(get(name)), [backbone], only=GRAPHS).pairs[backbone]
    assert pair.refusal or "compiles" in pair.passed


def test_the_report_tells_refusals_and_notes():
    text = str(check_method(small(get("bitfit")), ["bert", "t5"]))
    assert "refused: BitFit trains biases, and t5 has none" in text
    assert "never move: softmax ignores" in text


def test_unknown_check_names_those_that_exist():
    with pytest.raises(ValueError, match="loss_falls"):
        check_method(small(get("lora")), ["bert"], only=["los_falls"])


class Shift(Add):
    """A sound method: y <- y + v, v = 0 at the start. The ones below each break one thing."""

    sites: tuple[str, ...] = ("mlp.down",)

    def params(self, site):
        return {"v": zeros(site.d_out)}

    def forward(self, p, x, y):
        return y + (p["v"] if p["v"].dim() == 1 else p["v"][:, None])


class MergingShift(Shift):
    def fold(self, p, weight, bias):
        return weight, p["v"] if bias is None else bias + p["v"]


class Thawed(Shift):
    model_config = ConfigDict(frozen=False)


class Leaks(Shift):
    def install(self, build):
        super().install(build)
        with torch.no_grad():
            next(build.model.parameters()).mul_(1.001)


class FalselyIdentity(Shift):
    def params(self, site):
        return {"v": normal(site.d_out)}


class FalselyNot(Shift):
    identity: ClassVar[bool] = False


class TrainsTheBase(Shift):
    def install(self, build):
        super().install(build)
        next(p for n, p in build.model.named_parameters() if CHILD not in n).requires_grad_(True)


class Unused(Shift):
    def params(self, site):
        return {"v": zeros(site.d_out), "idle": zeros(3)}


class Climbs(Shift):
    """Its gradient has the wrong sign."""

    def forward(self, p, x, y):
        v = 2 * p["v"].detach() - p["v"]
        return y + (v if v.dim() == 1 else v[:, None])


class LeavesAHook(Shift):
    def install(self, build):
        super().install(build)
        build.model.register_forward_hook(lambda *_: None)


class Unseeded(Shift):
    identity: ClassVar[bool] = False

    def params(self, site):
        return {"v": Init((site.d_out,), lambda t, g: t.normal_(0, 0.02))}


class WrongMerge(Shift):
    def fold(self, p, weight, bias):
        return weight, 1.01 * (bias + p["v"])


class Forgets(Shift):
    """What it trains is not what it saves: `final` drops the sign."""

    def final(self, slots):
        return self, {f"{s.label}.v": s.v.detach().abs() for s in slots}


class MixesExamples(Shift):
    def forward(self, p, x, y):
        return y + p["v"] * y.mean(0, keepdim=True)


class ReadsPadding(Shift):
    def forward(self, p, x, y):
        v = p["v"] if p["v"].dim() == 1 else p["v"][:, None]
        return y + v * y.mean(1, keepdim=True)


class NoisyInEval(Shift):
    dropout: float = 0.0

    def forward(self, p, x, y):
        return y + F.dropout(p["v"], self.dropout, True)


class OneDtype(Shift):
    def forward(self, p, x, y):
        return y + p["v"] @ torch.eye(y.shape[-1])


class ClosesOverATensor(Shift):
    def install(self, build):
        for site in self.where(build.anatomy):
            slot = build.slot(self, site, "closed", self.params(site))
            build.module(site.path).register_forward_hook(lambda m, args, y, v=slot.v: y + v)


class OneForAll(Shift):
    """Knows no example axis."""

    def forward(self, p, x, y):
        return y + p["v"]


_RELAY: list[Tensor] = []


class SharesBetweenThreads(Shift):
    def forward(self, p, x, y):
        _RELAY.append(y)
        time.sleep(0.003)
        return super().forward(p, x, _RELAY.pop())


class FailsToAttach(Shift):
    def params(self, site):
        raise KeyError(site.name)


class RefusesTooLate(Shift):
    def install(self, build):
        build.model.register_buffer("left_behind", torch.zeros(1))
        raise SiteError("not here.")


class TwiceTheParameter(Unfreeze):
    """Owns a tensor of the base that no forward reads."""

    def tensors(self, build):
        build.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(2)))
        return ["spare"]


BROKEN = [
    (Thawed, "config_is_frozen_and_validated"), (Leaks, "base_is_unchanged"), (FalselyIdentity, "identity_as_claimed"),
    (FalselyNot, "identity_as_claimed"), (TrainsTheBase, "only_the_delta_trains"),
    (Unused, "every_tensor_gets_a_gradient"), (Climbs, "loss_falls"), (LeavesAHook, "detach_leaves_nothing"),
    (Unseeded, "seeded"), (WrongMerge, "merges_as_claimed"), (Forgets, "save_and_load"),
    (MixesExamples, "batch_size_invariance"), (ReadsPadding, "padding_changes_nothing"),
    (NoisyInEval, "dropout_is_off_in_eval"), (OneDtype, "every_tensor_gets_a_gradient"),
    (ClosesOverATensor, "disabled_is_the_base"), (OneForAll, "example_axis"),
    (SharesBetweenThreads, "threads_do_not_mix"), (FailsToAttach, "attaches"), (RefusesTooLate, "refusal"),
    (TwiceTheParameter, "base_is_unchanged"),
]


@pytest.fixture
def registered(monkeypatch):
    """Registers a class for the length of a test."""
    return lambda cls: monkeypatch.setitem(registry._REGISTRY, registry.key_of(cls), cls)


@pytest.mark.parametrize("cls", [Shift, MergingShift])
def test_a_sound_method_passes(cls, registered):
    registered(cls)
    report = check_method(cls(), ["bert", "gpt2"])
    assert all(len(pair.passed) >= 25 for pair in report.pairs.values())


@pytest.mark.parametrize(("cls", "check"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_method_is_caught(cls, check: str, registered):
    registered(cls)
    with pytest.raises(CheckFailure) as caught:
        check_method(cls(), ["bert"])
    assert caught.value.check == check, caught.value
    assert cls.__name__ in str(caught.value)
    assert "on bert" in str(caught.value)


def test_a_hook_that_closes_over_a_tensor_fails_to_copy(registered):
    registered(ClosesOverATensor)
    with pytest.raises(CheckFailure, match="training the copy does not change its output"):
        check_method(ClosesOverATensor(head="none"), ["bert"], only=["deepcopy_is_independent"])


def test_an_unregistered_method_is_told(registered):
    with pytest.raises(CheckFailure, match="no method is named 'shift'"):
        check_method(Shift(), ["bert"], only=["config_round_trip"])
