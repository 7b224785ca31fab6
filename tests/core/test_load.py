"""Loading a delta: every fault that only the layer above the file can see is refused, and the model stays itself."""
import copy
from pathlib import Path

import pytest
import torch

import slimtune as st
from slimtune.core.fingerprint import bits_digest
from slimtune.errors import DeltaError
from slimtune.testing import batch, output, tiny
from slimtune.testing.faults import delta_faults

METHODS = [st.methods.LoRA(rank=2), st.methods.BitFit(), st.methods.PrefixTuning(length=2)]
FAULTS = [f for f in delta_faults() if f.caught_by == "delta"]


def saved(tmp_path: Path, method: st.Method) -> Path:
    delta = st.attach(tiny("bert"), method, name="task")
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    delta.save(tmp_path / "task")
    return tmp_path / "task"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_signed_fault_is_refused_and_changes_nothing(tmp_path: Path, method: st.Method):
    model = tiny("bert")
    before, keys = bits_digest(model), list(model.state_dict())
    refused = 0
    for i, fault in enumerate(FAULTS):
        folder = tmp_path / f"fault{i}"
        folder.mkdir()
        path = saved(folder, method)
        fault.apply(path)
        with pytest.raises(DeltaError):
            st.load(model, path)
        refused += 1
        assert list(model.state_dict()) == keys, fault.name
    assert refused == len(FAULTS) > 20
    assert bits_digest(model) == before
    assert all(p.requires_grad for p in model.parameters())
    print(f"{refused} faults refused")


def test_another_base_is_refused(tmp_path: Path):
    path = saved(tmp_path, st.methods.LoRA(rank=2))
    with pytest.raises(DeltaError, match="another base"):
        st.load(tiny("bert", seed=1), path)
    with pytest.raises(DeltaError, match="shapes"):
        st.load(tiny("bert", num_hidden_layers=3), path)


def test_a_bfloat16_copy_of_the_base_takes_values_and_refuses_differences(tmp_path: Path):
    lora = st.load(tiny("bert").bfloat16(), saved(tmp_path / "a", st.methods.LoRA(rank=2)))
    assert next(lora.parameters()).dtype == torch.float32  # master weights
    with pytest.raises(DeltaError, match="another base"):
        st.load(tiny("bert").bfloat16(), saved(tmp_path / "b", st.methods.BitFit()))


def test_a_second_delta_is_checked_against_the_base_not_against_the_active_one(tmp_path: Path):
    path = saved(tmp_path, st.methods.BitFit())
    model = tiny("bert")
    full = st.attach(model, st.methods.Full(), name="full")
    with torch.no_grad():
        for p in full.parameters():
            p.mul_(1.5)
    st.load(model, path)
    alone = tiny("bert")
    st.load(alone, path)
    assert torch.equal(output(model, batch("bert")), output(alone, batch("bert")))


def test_a_failed_load_leaves_the_active_delta_active(tmp_path: Path):
    path = saved(tmp_path, st.methods.LoRA(rank=2))
    (path / "delta.safetensors").write_bytes(b"no")
    model = tiny("bert")
    first = st.attach(model, st.methods.IA3(), name="first")
    with pytest.raises(DeltaError):
        st.load(model, path)
    assert first.active
    assert list(st.deltas(model)) == ["first"]


@pytest.mark.parametrize("method", [*METHODS, st.methods.Full(), st.methods.PrefixTuning(length=2, hidden=4)],
                         ids=lambda m: type(m).__name__)
def test_a_round_trip_is_bitwise(tmp_path: Path, method: st.Method):
    model = tiny("bert")
    delta = st.attach(model, method)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    wanted = output(model, batch("bert"))
    delta.save(tmp_path / "d")
    other = tiny("bert")
    again = st.load(other, tmp_path / "d")
    assert torch.equal(output(other, batch("bert")), wanted)
    assert again.count().stored == delta.count().stored == sum(t.numel() for t in again.state().values())


def test_a_copy_of_the_model_has_its_own_delta():
    model = tiny("bert")
    delta = st.attach(model, st.methods.LoRA(rank=2))
    twin = copy.deepcopy(model)
    wanted = output(model, batch("bert"))
    with torch.no_grad():
        for p in st.deltas(twin)["default"].parameters():
            p.add_(1.0)
    assert torch.equal(output(model, batch("bert")), wanted)
    assert not torch.equal(output(twin, batch("bert")), wanted)
    st.deltas(twin)["default"].detach()
    assert delta.active
