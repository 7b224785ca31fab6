"""A folder that can be trusted: its manifest against hashlib and json, and what is refused, by name."""
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from slimtune.core import manifest
from slimtune.core.atomic import verify_folder, write_folder
from slimtune.core.deltafile import read_delta, write_delta
from slimtune.errors import DeltaError
from slimtune.testing.faults import delta_faults


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_folder(tmp_path / "t", {"a.bin": b"old" * 9, "b.bin": b"B", "c.bin": lambda path: path.touch()}, {"n": 1})
    return tmp_path / "t"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_delta(tmp_path / "d", {"A": torch.randn(4, 8), "B": torch.zeros(8, 4)}, {"task": "sst2"})
    return tmp_path / "d"


def test_manifest_against_hashlib(target: Path):
    text = (target / "delta.json").read_text()
    told = json.loads(text)
    for name, data in (("a.bin", b"old" * 9), ("b.bin", b"B"), ("c.bin", b"")):
        assert told["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal = told.pop("self")
    assert seal == hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert verify_folder(target) == json.loads(text)


@pytest.mark.parametrize(("info", "where"), [
    ({"a": {"b": [1, float("nan")]}}, r"delta\.json\.a\.b\[1\]"), ({"a": {1: 2}}, r"delta\.json\.a: the key 1"),
    ({"x": {"y": object()}}, r"delta\.json\.x\.y: a object"), ({"files": {}}, "'files'"), ({"self": ""}, "'self'")])
def test_bad_manifest_says_where(target: Path, info: dict, where: str):
    with pytest.raises(DeltaError, match=where):
        write_folder(target, {}, info)


@pytest.mark.parametrize(("harm", "says"), [
    (lambda t: (t / "a.bin").unlink(), r"a\.bin is missing"),
    (lambda t: (t / "a.bin").write_bytes(b"old" * 8 + b"olb"), r"a\.bin does not match its manifest \(SHA-256"),
    (lambda t: (t / "a.bin").write_bytes(b"old"), r"a\.bin has 3 bytes, its manifest says 27"),
    (lambda t: (t / "b.bin").rename(t / "x.bin"), r"holds 'x\.bin', which its manifest does not name"),
    (lambda t: ((t / "b.bin").unlink(), (t / "b.bin").symlink_to(t / "a.bin")), r"b\.bin is a symlink"),
    (lambda t: ((t / "b.bin").unlink(), os.mkfifo(t / "b.bin")), r"b\.bin is not a regular file"),
    (lambda t: (t / "delta.json").unlink(), r"delta\.json is missing"),
])
def test_verify_names_the_file(target: Path, harm, says: str):
    harm(target)
    with pytest.raises(DeltaError, match=says) as caught:
        verify_folder(target)
    assert str(target) in str(caught.value)


def test_parsed_bytes_are_the_hashed_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file is opened once: nobody can exchange it between the check and the use."""
    opened, plain = [], manifest.open_regular
    monkeypatch.setattr(manifest, "open_regular", lambda path: opened.append(path.name) or plain(path))
    read_delta(folder)
    assert opened == ["delta.json", "delta.safetensors"]


@pytest.mark.parametrize(("fault", "says"), [
    ("header length 9223372036854775808", "its header claims 9223372036854775808 bytes; the file has"),
    ("header: 17 MB of spaces", "its header claims .* and the limit is 16 MB"),
    ("header: 120,000 tensors", "120000 tensors; a file has at most 100000"),
    ("signed pickle 2", "not a safetensors file, but a pickle or zip file.\n  A pickle can run code"),
    ("signed zip of pickles", "not a safetensors file, but a pickle or zip file"),
    ("extra file delta.bin", "holds 'delta.bin'.*\n.*\n  It may be a pickle, which can run code"),
    ("delta.json: a repeated key", "the key 'format_version' is there twice"),
    ("delta.json: 17 MB", "larger than 16 MB"), ("a file named '../delta.outside'", "is not a plain file name"),
])
def test_bounds_come_before_parsing(folder: Path, fault: str, says: str):
    next(one for one in delta_faults() if one.name == fault).apply(folder)
    with pytest.raises(DeltaError, match=says):
        read_delta(folder)
