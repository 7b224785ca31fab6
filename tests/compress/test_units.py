"""The cost of a unit on a clock that the model itself moves, by the shapes it really has; nothing here is timed."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slimtune as st
from slimtune.compress import unit_times
from slimtune.core.fingerprint import bits_digest
from slimtune.errors import MethodError, SlimtuneError
from slimtune.sparsity.budget import Budget
from slimtune.testing import batch, output, tiny
from slimtune.testing.case import outline

HEAD, NEURON, REST = 0.004, 0.0003, 0.9


class Clock:
    """Seconds that pass in a forward of a BERT: REST, HEAD for each head and NEURON for each neuron that is there,
    and what else the machine does in the meantime, more and more of it."""

    def __init__(self, model: nn.Module, neuron: float = NEURON) -> None:
        self.now, self.calls, self.neuron, self.training = 0.0, 0, neuron, set[bool]()
        model.register_forward_hook(self.ran)

    def ran(self, model: nn.Module, args: object, out: object) -> None:
        layers = model.bert.encoder.layer
        heads = sum(layer.attention.self.query.weight.shape[0] // 8 for layer in layers)
        neurons = sum(layer.intermediate.dense.weight.shape[0] for layer in layers)
        self.training.add(model.training)
        self.calls += 1
        self.now += (REST + HEAD * heads + self.neuron * neurons) * (1 + self.calls // 100)

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: object) -> "Clock":
        return self


@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.75), (0.5,), (0.1, 0.26)])
def test_slopes_are_the_costs(shares: tuple[float, ...]):
    model = tiny("bert").train()
    clock = Clock(model)
    found = unit_times(model, batch("bert"), shares=shares, rounds=5, clock=clock)
    assert found.each == pytest.approx({"attn.heads": 1e3 * HEAD, "mlp.act": 1e3 * NEURON})
    assert found.whole.p50 == pytest.approx(1e3 * (REST + 8 * HEAD + 128 * NEURON))
    assert found.spread["mlp.act"].p10 == pytest.approx(found.spread["mlp.act"].p90)
    assert found.left["mlp.act"] == (128, *(2 * round(64 * share) for share in sorted(shares, reverse=True)))
    assert found.left["attn.heads"][1] < 8
    assert clock.training == {False}
    assert "128 = 38.400 ms" in str(found)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_multiply_adds_as_a_clock(family: str):
    """What is really executed, counted by torch, against count_macs."""
    model = tiny(family, attn_implementation="eager")
    size, tokens = (3, 17) if family == "vit" else (3, 7)
    with FlopCounterMode(display=False) as flops:
        found = unit_times(model, batch(family), rounds=2, clock=flops.get_total_flops)
    macs = st.count_macs(model, tokens)
    assert found.each == pytest.approx({"attn.heads": 2e3 * size * next(iter(macs.heads.values())),
                                        "mlp.act": 2e3 * size * next(iter(macs.neurons.values()))})


def test_the_median_over_rounds():
    """A slow moment moves one round's slope, and not the result; its spread shows it."""
    model = tiny("bert")
    clock = Clock(model)
    ticks = {40: 5.0}

    def late() -> float:
        clock.now += ticks.pop(clock.calls, 0.0)
        return clock.now

    found = unit_times(model, batch("bert"), ["mlp.act"], rounds=9, warmup=0, clock=late)
    assert ticks == {}
    assert found.each == pytest.approx({"mlp.act": 1e3 * NEURON})
    assert abs(found.spread["mlp.act"].p90 - found.spread["mlp.act"].p10) > 1e-3


def test_into_a_budget():
    model = tiny("bert")
    found = unit_times(model, batch("bert"), rounds=3, clock=Clock(model))
    delta = st.attach(model, st.methods.Gates())
    st.prune(delta, 0.5, "fisher", on="gates", batches=[batch("bert")],
             allocation=Budget(unit="latency", each=found.each))
    spent = sum(int(m.sum()) * found.each["attn.heads" if "heads" in n else "mlp.act"] for n, m in delta.masks.items())
    half = 0.5 * 1e3 * (8 * HEAD + 128 * NEURON)
    assert half - 1e3 * NEURON < spent <= half * (1 + 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "swin", "vit"])
def test_families_and_the_model_stays_as_it_was(family: str):
    """Gates with soft coefficients, LoRA and a trained head are folded in the copies alone."""
    model, inputs = tiny(family), batch(family)
    delta = st.attach(model, [st.methods.Gates(), st.methods.LoRA(rank=2, sites=("attn.v",))])
    with torch.no_grad():
        for p in delta.parameters():
            p.mul_(0.9).add_(0.01)
        told = output(model, inputs)
    before, bits, state = outline(model), bits_digest(model), {n: t.clone() for n, t in delta.state().items()}
    found = unit_times(model, inputs, rounds=1, warmup=0, clock=(n**0.5 for n in range(99)).__next__)
    assert set(found.each) == {"attn.heads", "mlp.act"}
    assert found.setting["shapes"] == {name: tuple(t.shape) for name, t in inputs.items()}
    assert (outline(model), bits_digest(model)) == (before, bits)
    assert all(torch.equal(t, state[n]) for n, t in delta.state().items())
    assert delta.active
    with torch.no_grad():
        assert torch.equal(output(model, inputs), told)


def test_only_what_is_sliced_is_copied(monkeypatch: pytest.MonkeyPatch):
    from slimtune.compress import units
    model, seen = tiny("bert"), []
    own = {id(p) for p in model.parameters()}
    cut = units.shrink
    monkeypatch.setattr(units, "shrink", lambda made, keep, **more: (seen.append(made), cut(made, keep, **more))[1])
    unit_times(model, batch("bert"), ["mlp.act"], shares=[0.5], rounds=1, clock=(n**0.5 for n in range(99)).__next__)
    assert [{n.split(".", 4)[-1] for n, p in made.named_parameters() if id(p) not in own} for made in seen] == [
        set(), {"intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"}]


def test_refused():
    model, inputs = tiny("bert"), batch("bert")
    before = outline(model)
    with pytest.raises(MethodError, match=r"no units of 'mlp.acts'.\n.*attn.heads mlp.act\n.*Did you mean 'mlp.act'"):
        unit_times(model, inputs, ["mlp.acts"])
    for shares, rounds in (((), 1), ((0.5, 1.0), 1), ((0.5,), 0)):
        with pytest.raises(SlimtuneError, match="needs a round, and shares"):
            unit_times(model, inputs, shares=shares, rounds=rounds)
    with pytest.raises(SlimtuneError, match=r"fewer units of attn.heads.\n.*kinds="):
        unit_times(tiny("llama", num_key_value_heads=1), batch("llama"))
    with pytest.raises(SlimtuneError, match="model is on meta"):
        unit_times(tiny("bert").to("meta"), inputs)
    assert outline(model) == before
    with pytest.raises(SlimtuneError, match=r"no cost of mlp\.act shows above the noise"):
        unit_times(model, inputs, rounds=2, clock=Clock(model, neuron=-NEURON))
