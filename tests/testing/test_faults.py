"""Every fault of the injector is refused by the layer that can tell, and nothing is run or changed."""
import hashlib
import pickle
import shutil
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from slimtune.core.deltafile import read_delta, write_delta
from slimtune.errors import DeltaError
from slimtune.testing import tamper
from slimtune.testing.faults import Fault, canary, delta_faults, resign

FAULTS = list(delta_faults())
INFO = {"methods": [{"name": "lora", "rank": 4, "alpha": 16.0, "dropout": 0.1, "sites": ["attn.q", "attn.v"]}],
        "base": {"shapes": "a1", "exact": "b2", "rounded": "c3"}, "counts": {"adapter": 96, "head": 3, "stored": 99},
        "differences": [], "seed": 0, "name": "sst2", "model_type": "bert",
        "info": {"labels": ["no", "yes"], "eps": None}}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good") / "delta"
    names = [f"encoder.{i}.attn.{role}.lora.{part}" for i in (0, 1) for role in "qv" for part in "AB"]
    tensors = {name: torch.randn(4, 8) for name in names}
    write_delta(folder, tensors | {"head.bias": torch.randn(3).bfloat16(), "head.mask": torch.tensor([True, False]),
                                   "scale": torch.tensor(2.0), "none": torch.zeros(0, 3)}, INFO)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Kind, and bytes or aim, of everything in and beside the folder."""
    found = {}
    for path in sorted(folder.parent.rglob("*")):
        what = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not what:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder.parent))] = (path.lstat().st_mode, what)
    return found


def damaged(fault: Fault, good: Path, home: Path) -> Path:
    folder = home / "delta"
    shutil.copytree(good, folder)
    fault.apply(folder)
    return folder


def test_all_file_faults_are_refused(good: Path, tmp_path: Path):
    said, slow = Counter(), []
    faults = [fault for fault in FAULTS if fault.caught_by == "file"]
    for i, fault in enumerate(faults):
        home = tmp_path / str(i)
        folder = damaged(fault, good, home)
        before = snapshot(folder)
        start = time.perf_counter()
        with pytest.raises(DeltaError) as caught:
            assert read_delta(folder) == fault.name         # says which one, should it be accepted
        slow.append((time.perf_counter() - start, fault.name))
        message = str(caught.value)
        assert str(folder) in message, fault.name
        assert len(message.splitlines()) >= 2, fault.name
        assert len(message) < 3000, fault.name
        assert snapshot(folder) == before, fault.name
        assert not canary(folder).exists(), fault.name
        said[caught.value.what.replace(str(folder), "")[:24]] += 1
        shutil.rmtree(home)
    print(f"\n{len(faults)} of {len(faults)} file faults refused in {len(said)} ways; slowest {max(slow)}")
    assert len(faults) >= 300
    assert len(said) > 40
    assert max(slow)[0] < 5


def test_signed_strangers_are_sound_files(good: Path, tmp_path: Path):
    """What is left for `load` to judge: `read_delta` finds nothing wrong, and the content is another one."""
    strangers = [fault for fault in FAULTS if fault.caught_by == "delta"]
    info, tensors = read_delta(good)
    for i, fault in enumerate(strangers):
        other_info, others = read_delta(damaged(fault, good, tmp_path / str(i)))
        same = list(others) == list(tensors) and all(
            others[k].dtype == tensors[k].dtype and torch.equal(others[k], tensors[k]) for k in tensors)
        assert not same or other_info != info, fault.name
    print(f"\n{len(strangers)} strangers")
    assert len(strangers) >= 25


def test_every_fault_changes_something_and_is_deterministic(good: Path, tmp_path: Path):
    again = {fault.name: fault for fault in delta_faults()}
    assert len(again) == len(FAULTS)                        # names are unique
    plain = snapshot(_copy(good, tmp_path / "home"))
    for fault in FAULTS:
        if "17 MB" in fault.name or ",000" in fault.name or "10^6" in fault.name:
            continue                                        # large, and no randomness in them
        shutil.rmtree(tmp_path / "home")
        one = snapshot(damaged(fault, good, tmp_path / "home"))
        shutil.rmtree(tmp_path / "home")
        two = snapshot(damaged(again[fault.name], good, tmp_path / "home"))
        assert one == two, fault.name
        assert one != plain, fault.name


def _copy(good: Path, home: Path) -> Path:
    return Path(shutil.copytree(good, home / "delta"))


def test_seed_moves_the_flips(good: Path, tmp_path: Path):
    def flipped(seed: int, home: Path) -> set[bytes]:
        found = set()
        for i, fault in enumerate(fault for fault in delta_faults(seed) if fault.name.startswith("bit flip")):
            found.add((damaged(fault, good, home / str(i)) / "delta.safetensors").read_bytes())
        return found

    a, b, c = flipped(0, tmp_path / "a"), flipped(0, tmp_path / "b"), flipped(1, tmp_path / "c")
    assert a == b != c
    assert len(a) > 60


def test_the_canary_sings(good: Path, tmp_path: Path):
    """The pickles among the faults are live ones: a reader that opens them is found out."""
    folder = _copy(good, tmp_path)
    for protocol in (0, 2, 4):
        pickle.loads(tamper.pickled(folder, protocol)).close()
        assert canary(folder).exists()
        canary(folder).unlink()
    tamper.zipped(folder, tmp_path / "z")
    pickle.loads(zipfile.ZipFile(tmp_path / "z").read("archive/data.pkl")).close()
    assert canary(folder).exists()


def test_resign_makes_everything_right_again(good: Path, tmp_path: Path):
    folder = _copy(good, tmp_path)
    before = (folder / "delta.json").read_bytes()
    resign(folder, table=True)
    assert (folder / "delta.json").read_bytes() == before
    tamper.edit_tensors(folder, lambda tensors: tensors["scale"].add_(1))
    with pytest.raises(DeltaError, match="SHA-256"):
        read_delta(folder)
    resign(folder)
    assert read_delta(folder)[1]["scale"] == 3


@pytest.mark.parametrize("name", ["delta.safetensors", "delta.json"])
def test_bits_all_over(good: Path, tmp_path: Path, name: str):
    """Not a random sample: one bit in every third byte, from the first to the last, each bit in turn."""
    folder = _copy(good, tmp_path)
    data = (folder / name).read_bytes()
    for i, place in enumerate(range(0, len(data), 3)):
        wrong = bytearray(data)
        wrong[place] ^= 1 << (i % 8)
        (folder / name).write_bytes(wrong)
        with pytest.raises(DeltaError):
            read_delta(folder)
    (folder / name).write_bytes(data)
    assert read_delta(folder)[0] == INFO
