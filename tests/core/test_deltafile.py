"""The delta file: bitwise round trips, and what it refuses, by name."""
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from slimtune.core.deltafile import FORMAT_VERSION, RESERVED, read_delta, write_delta
from slimtune.core.mask import unpacked
from slimtune.core.tensorfile import MAX_TENSORS
from slimtune.errors import DeltaError
from slimtune.testing.kill import failing_io, kill_points, run_killed, run_killed_after
from slimtune.testing.tamper import edit_manifest, edit_tensors, resign

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
          torch.bool, torch.complex64]
SHAPES = [(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (3, 0, 2)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    values = torch.randint(0, 100, shape) if not dtype.is_floating_point else torch.randn(shape)
    return values.to(dtype)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k])
                                      for k in a)


def refusal(action) -> DeltaError | None:
    try:
        action()
    except DeltaError as error:
        return error
    return None


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_delta(tmp_path / "d", {"q.A": torch.randn(4, 8), "q.B": torch.zeros(8, 4), "head.b": torch.ones(3)},
                {"methods": [{"name": "lora", "rank": 4}], "task": "sst2"})
    return tmp_path / "d"


def test_every_dtype_and_shape_bitwise(tmp_path: Path):
    tensors = {f"{dtype}.{i}": some(dtype, shape) for dtype in DTYPES for i, shape in enumerate(SHAPES)}
    tensors = {key: tensors[key] for key in sorted(tensors)}
    write_delta(tmp_path / "d", tensors, {})
    assert same(tensors, read_delta(tmp_path / "d")[1])
    assert same(tensors, dict(sorted(load_file(tmp_path / "d" / "delta.safetensors").items())))   # the library's own


def test_views_and_shared_memory(tmp_path: Path):
    base = torch.randn(6, 6)
    whole = torch.randn(10)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[1:3], "e": base[:, ::2], "f": base[0].expand(4, 6),
               "g": torch.randn(3, dtype=torch.complex64).conj(), "h": whole[2:], "i": whole,
               "j": torch.nn.Parameter(torch.ones(2)), "k": base[0, 0], "l": torch.randn(2, 3, 4, 5).to(
                   memory_format=torch.channels_last)}
    write_delta(tmp_path / "d", tensors, {})
    back = read_delta(tmp_path / "d")[1]
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert all(value.is_contiguous() and not value.requires_grad for value in back.values())
    back["a"].zero_()                                       # writable, and of its own
    assert torch.equal(back["b"], base)
    assert (tmp_path / "d" / "delta.safetensors").stat().st_size < 2500


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
                    max_leaves=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(info=st.dictionaries(st.text().filter(lambda key: key not in RESERVED), JSON, max_size=5))
def test_any_json_comes_back(tmp_path: Path, info: dict):
    write_delta(tmp_path / "d", {}, info)
    back = read_delta(tmp_path / "d")[0]
    assert back == info
    assert json.dumps(back, sort_keys=True) == json.dumps(info, sort_keys=True)     # 1 is not 1.0 or True


def test_same_content_same_bytes(tmp_path: Path):
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2)}
    write_delta(tmp_path / "x", tensors, {"p": 1, "q": 2})
    write_delta(tmp_path / "y", dict(reversed(tensors.items())), {"q": 2, "p": 1})
    assert snapshot(tmp_path / "x") == snapshot(tmp_path / "y")


def test_golden_files_load():
    """Files of every released format version load for ever."""
    folders = sorted(GOLDEN.iterdir())
    assert [path.name for path in folders] == [f"delta-v{version + 1}" for version in range(FORMAT_VERSION)]
    info, tensors = read_delta(folders[0])
    assert info == {"methods": [{"name": "lora", "rank": 2}], "task": "golden", "eps": 0.1,
                    "labels": ["no", "ja \u00e9"]}
    assert torch.equal(tensors["q.A"], torch.arange(6.0).reshape(2, 3) / 8)
    assert torch.equal(tensors["mask"], torch.tensor([1, 128, 255], dtype=torch.uint8))
    assert torch.equal(tensors["scale"], torch.tensor(0.5, dtype=torch.bfloat16))
    info, tensors = read_delta(folders[1])
    values, masks = unpacked(tensors, info["masks"])
    assert values["q.A"].tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, -2.0]]
    assert masks["q.A"].tolist() == [[True, False, True], [False, False, True]]
    assert masks["own.q.weight"].tolist() == [[False, True], [True, True]]


def test_format_on_disk(folder: Path):
    told = json.loads((folder / "delta.json").read_text())
    data = (folder / "delta.safetensors").read_bytes()
    assert told["format"] == "slimtune-delta"
    assert told["format_version"] == 1
    assert told["tensors"]["q.A"] == {"dtype": "float32", "shape": [4, 8]}
    assert told["files"] == {"delta.safetensors": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("tensors", "info", "says"), [
    ({"a": torch.tensor([1.0, float("nan")])}, {}, r"'a' holds NaN or Inf \(1 of 2"),
    ({"a": torch.tensor([-float("inf")], dtype=torch.bfloat16)}, {}, "'a' holds NaN or Inf"),
    ({"a": torch.tensor(complex(0, float("inf")), dtype=torch.complex64)}, {}, "'a' holds NaN or Inf"),
    ({"a": torch.tensor(float("nan")).to(torch.float8_e4m3fn)}, {}, "'a' holds NaN or Inf"),
    ({"a": torch.ones(2, 2).to_sparse()}, {}, "a has no plain values"),
    ({"a": torch.ones(2, device="meta")}, {}, "a has no plain values: it is meta"),
    ({"a": torch.ones(2, dtype=torch.complex128)}, {}, r"a has dtype torch\.complex128.*\n.*float32"),
    ({"a": [1.0]}, {}, "a is a list, not a tensor"), ({"": torch.ones(1)}, {}, "'' cannot be the name"),
    ({"__metadata__": torch.ones(1)}, {}, "'__metadata__' cannot be the name"),
    ({1: torch.ones(1)}, {}, "'1' cannot be"),
    ({"\ud800": torch.ones(1)}, {}, "cannot be the name"), ({}, {"format": "mine"}, "the key 'format' is taken"),
    ({}, {"eps": float("inf")}, r"delta\.json\.eps: inf cannot be written as JSON"),
    ({}, {"m": {"t": torch.ones(1)}}, r"delta\.json\.m\.t: a Tensor cannot"),
])
def test_refused_on_write(folder: Path, tensors: dict, info: dict, says: str):
    before = snapshot(folder)
    with pytest.raises(DeltaError, match=says):
        write_delta(folder, tensors, info)
    assert snapshot(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_too_many_tensors(tmp_path: Path):
    one = torch.zeros(1)
    with pytest.raises(DeltaError, match="100001 tensors"):
        write_delta(tmp_path / "d", {str(i): one for i in range(MAX_TENSORS + 1)}, {})


def test_nonfinite_only_when_asked(tmp_path: Path):
    bad = {"a": torch.tensor([1.0, float("nan"), float("inf")])}
    write_delta(tmp_path / "d", bad, {}, allow_nonfinite=True)
    with pytest.raises(DeltaError, match=r"'a' holds NaN or Inf \(2 of 3"):
        read_delta(tmp_path / "d")
    assert bits(read_delta(tmp_path / "d", allow_nonfinite=True)[1]["a"]) == bits(bad["a"])


def test_overwrite(folder: Path):
    before = snapshot(folder)
    with pytest.raises(DeltaError, match="is there already"):
        write_delta(folder, {}, {}, overwrite=False)
    assert snapshot(folder) == before
    write_delta(folder, {}, {"n": 2})
    assert read_delta(folder) == ({"n": 2}, {})
    write_delta(folder.parent / "e", {}, {}, overwrite=False)


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.update({"q.A_": t.pop("q.A")}), r"'q\.A' is missing .*\n.*\n.*It may have been renamed to 'q\.A_'"),
    (lambda t: t.pop("q.B"), r"'q\.B' is missing .*\n  There is: head\.b q\.A"),
    (lambda t: t.update(extra=torch.ones(1)), "holds 'extra', which delta.json does not name"),
    (lambda t: t.update({"q.A": t["q.A"].T.contiguous()}), r"'q\.A' is float32 \[8, 4\] .* float32 \[4, 8\] in delta"),
    (lambda t: t.update({"q.A": t["q.A"].half()}), r"'q\.A' is float16 \[4, 8\] .* float32 \[4, 8\] in delta"),
])
def test_tensors_told_by_name_though_hashes_are_right(folder: Path, change, says: str):
    edit_tensors(folder, change)
    resign(folder)
    with pytest.raises(DeltaError, match=says):
        read_delta(folder)


def test_messages(folder: Path, tmp_path: Path):
    with pytest.raises(DeltaError, match=r"dd: no such folder\.\n  Deltas beside it: d\.\n  Did you mean 'd'\?"):
        read_delta(tmp_path / "dd")
    edit_manifest(folder, lambda m: m.update(format_version=3, slimtune="9.9"), sealed=False)
    with pytest.raises(DeltaError, match=r"written by a newer slimtune \(9\.9\).* up to 2\.\n  Upgrade"):
        read_delta(folder)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaError, match=r"delta\.json is missing\.\n  There is: adapter_config\.json"):
        read_delta(tmp_path / "peft")


def test_kill_at_every_operation(folder: Path):
    old, new = read_delta(folder)[1], {"q.A": torch.full((3, 3), 7.0)}
    seen = []
    for n in range(1, kill_points(lambda: write_delta(folder, new, {})) + 1):
        write_delta(folder, old, {})
        assert run_killed(lambda: write_delta(folder, new, {}), n)
        back = read_delta(folder)[1]                        # recovers by itself
        assert same(back, old) or same(back, new)
        seen.append(same(back, new))
    assert seen == sorted(seen)
    assert len(set(seen)) == 2
    assert len(seen) >= 14


def test_full_disk_at_every_operation(folder: Path):
    old, before, failures = snapshot(folder), read_delta(folder), 0
    for n in range(1, kill_points(lambda: write_delta(folder, {}, {})) + 1):
        with failing_io(n, 28) as disk:
            error = refusal(lambda: write_delta(folder, {}, {}))
        if error:
            failures += 1
            assert "No space left on device" in str(error)
            assert snapshot(folder) == old, disk.seen
        else:                                               # only what does not matter failed
            assert read_delta(folder)[1] == {}
            write_delta(folder, *reversed(before))
    assert failures >= 10


def test_a_real_full_disk(folder: Path):
    """The kernel's own refusal, in the middle of the native writer."""
    before = snapshot(folder)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(DeltaError, match="could not be written"):
            write_delta(folder, {"a": torch.zeros(100_000)}, {})

    assert not run_killed(limited, 10**6)
    assert snapshot(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of peak memory")
def test_memory_is_twice_the_file(tmp_path: Path):
    size = 64 * 2**20
    write_delta(tmp_path / "d", {"a": torch.zeros(size // 8), "b": torch.zeros(size // 8)}, {})
    write_delta(tmp_path / "small", {"a": torch.zeros(1)}, {})
    peak = tmp_path / "peak"

    def measure() -> None:
        read_delta(tmp_path / "small")                      # imports are no part of it
        Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here
        before = _status("VmHWM")
        read_delta(tmp_path / "d")
        peak.write_text(str((_status("VmHWM") - before) * 1024))

    assert not run_killed_after(measure, 60)
    print(f"\npeak memory {int(peak.read_text()) / size:.2f} x file")
    assert int(peak.read_text()) < 2.1 * size


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
