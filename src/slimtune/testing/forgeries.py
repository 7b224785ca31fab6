"""Delta folders forged with right hashes, so that only the meaning of their content gives them away."""
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.deltafile import MANIFEST, TENSORS
from slimtune.core.manifest import render, seal
from slimtune.testing import tamper
from slimtune.testing.tamper import edit_manifest, edit_tensors, header_of, pick, put_header, resign

Edit = Callable[[Path], Any]
Text = Callable[[bytes], bytes]
_MB17 = b" " * (17 * 2**20)
_PATHS = ("../delta.outside", "/etc/hostname", "sub/delta.safetensors", "..", ".", "", "delta.json",
          "./delta.safetensors", "C:\\delta", "..\\delta", "delta.safetensors\0", "~/delta", "a\nb",
          "x" * 5000, "\ud800")
_SIZES = (("size", "1"), ("size", -1), ("size", True), ("size", 2**70), ("size", 1.5), ("sha256", None),
          ("sha256", "0" * 64), ("sha256", ""))
_JSON: dict[str, Text] = {
    "a repeated key": lambda text: b'{"format_version": 1,' + text[1:],
    "a repeated key inside": lambda text: text.replace(b'"sha256"', b'"size": 1, "sha256"', 1),
    "NaN": lambda text: _with_literal(text, "NaN"),
    "Infinity": lambda text: _with_literal(text, "-Infinity"),
    "1e999": lambda text: _with_literal(text, "1e999"),
    "a huge number": lambda text: _with_literal(text, "9" * 6000),
    "deep lists": lambda text: _with_literal(text, "[" * 100_000 + "]" * 100_000),
    "17 MB": lambda text: text + _MB17,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "Latin-1": lambda text: b'{"\xe9": 1,' + text[1:],
    "a list": lambda text: b"[" + text + b"]",
    "null": lambda text: b"null",
    "text after it": lambda text: text + b"{}",
    "a comment": lambda text: b"/* */" + text,
    "nothing": lambda text: b"",
    "an empty object": lambda text: b"{}",
    "a sealed empty object": lambda text: render(seal({})),
}
_ENTRY: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "dtype F4": lambda header, key: header[key].update(dtype="F4"),
    "dtype null": lambda header, key: header[key].update(dtype=None),
    "dtype a list": lambda header, key: header[key].update(dtype=["F32"]),
    "no dtype": lambda header, key: header[key].pop("dtype"),
    "negative shape": lambda header, key: header[key].update(shape=[-1]),
    "huge shape": lambda header, key: header[key].update(shape=[2**62] * 4),
    "text shape": lambda header, key: header[key].update(shape="1"),
    "no shape": lambda header, key: header[key].pop("shape"),
    "offsets reversed": lambda header, key: header[key]["data_offsets"].reverse(),
    "offsets beyond the end": lambda header, key: header[key].update(data_offsets=[0, 2**40]),
    "offsets of 64 bits": lambda header, key: header[key].update(data_offsets=[2**63, 2**63 + 8]),
    "offsets negative": lambda header, key: header[key].update(data_offsets=[-8, 0]),
    "no offsets": lambda header, key: header[key].pop("data_offsets"),
    "a name of 5000 letters": lambda header, key: header.update({"x" * 5000: header.pop(key)}),
    "a name with escape codes": lambda header, key: header.update({"\x1b[2J": header.pop(key)}),
    "entry null": lambda header, key: header.update({key: None}),
    "entry a list": lambda header, key: header.update({key: []}),
    "overlap": lambda header, key: header.update({"overlap": dict(header[key])}),
}
_HEADER: dict[str, Text] = {
    "a repeated key": lambda text: b'{"__metadata__":{},' + text[1:],
    "not UTF-8": lambda text: b'{"\xff":1,' + text[1:],
    "a list": lambda text: b"[" + text + b"]",
    "spaces": lambda text: b" " * len(text),
    "deep lists": lambda text: b'{"a":' + b"[" * 10**6,
    "17 MB of spaces": lambda text: text + _MB17,
    "120,000 tensors": lambda text: _many(120_000),
    "10^6 tensors": lambda text: _many(10**6),
}
_TENSOR: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "renamed": lambda tensors, key: tensors.update({key + "x": tensors.pop(key)}),
    "missing": lambda tensors, key: tensors.pop(key),
    "added": lambda tensors, key: tensors.update({key + ".extra": torch.ones(3)}),
    "twice as long": lambda tensors, key: tensors.update({key: torch.cat([tensors[key]] * 2)}),
    "reshaped": lambda tensors, key: tensors.update({key: tensors[key].reshape(1, -1, 1)}),
    "of integers": lambda tensors, key: tensors.update({key: tensors[key].to(torch.int64)}),
    "complex": lambda tensors, key: tensors.update({key: tensors[key].to(torch.complex64)}),
}
_STRANGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other base": lambda manifest: _other_base(manifest),
    "no base": lambda manifest: manifest.pop("base"),
    "base null": lambda manifest: manifest.update(base=None),
    "unknown field of the method": lambda manifest: manifest["methods"][0].update(no_such_field=1),
    "unknown method": lambda manifest: manifest["methods"][0].update(name="no-such-method"),
    "method without a name": lambda manifest: manifest["methods"][0].pop("name"),
    "no methods": lambda manifest: manifest.update(methods=[]),
    "methods missing": lambda manifest: manifest.pop("methods"),
}


def manifests() -> Iterator[tuple[str, Edit]]:
    """Forged descriptions: format, table of files, JSON that is read in more than one way."""
    for value in ("slimtune", None, 1, ["slimtune-delta"]):
        yield f"format {value!r}", functools.partial(_set, "format", value)
    for value in (3, 10**9, 0, -1, 1.0, "1", True, None, [1]):
        yield f"format version {value!r}", functools.partial(_set, "format_version", value)
    for value in ([], None, {}, {TENSORS: None}, {TENSORS: []}, "x"):
        yield f"files {value!r}", functools.partial(_set, "files", value)
        yield f"tensors {value!r}", functools.partial(_set, "tensors", value)
    for path in _PATHS:
        yield f"a file named {path[:20]!r}", functools.partial(_name_file, path)
    for word, told in _SIZES:
        yield f"files: {word} {told!r:.20}", functools.partial(_tell_file, word, told)
    yield "a second file, named", _second_file
    yield "a symlink, named", _named_link
    for name, change in _JSON.items():
        yield f"{MANIFEST}: {name}", functools.partial(tamper.rewrite, MANIFEST, change)


def headers() -> Iterator[tuple[str, Edit]]:
    """Forged headers of the tensor file, with the hashes of the forged file."""
    for length in (0, 1, 2**63, 2**64 - 1, 2**40, 10**8, 17 * 2**20):
        yield f"header length {length}", functools.partial(_claim, length)
    for name, change in _ENTRY.items():
        yield f"header: {name}", functools.partial(_edit_header, change)
    for name, text in _HEADER.items():
        yield f"header: {name}", functools.partial(_edit_header_text, text)
    yield "bytes after the tensors", functools.partial(_edit_data, lambda data: data + b"PK\x03\x04" * 9)
    yield "bytes missing from the tensors", functools.partial(_edit_data, lambda data: data[:-1])
    for protocol in (0, 2, 4):
        yield f"signed pickle {protocol}", functools.partial(_signed_pickle, protocol)
    yield "signed zip of pickles", _signed_zip


def tensors() -> Iterator[tuple[str, Edit]]:
    """Other tensors than their table tells, and values that are not finite; the file's hash is right."""
    for part in (0.0, 0.5, 0.99):
        for name, change in _TENSOR.items():
            yield f"tensor {part} {name}", functools.partial(_forge, change, part, False)
        for value in ("nan", "inf", "-inf"):
            for place in (0, -1):
                change = functools.partial(_poison, value, place)
                yield f"tensor {part} with {value} at {place}", functools.partial(_forge, change, part, True)


def strangers() -> Iterator[tuple[str, Edit]]:
    """Well-formed, rightly hashed files that are not what this method would have saved on this backbone."""
    for name in ("renamed", "missing", "twice as long", "reshaped", "of integers", "added"):
        for part in (0.0, 0.5, 0.99):
            yield f"signed: tensor {part} {name}", functools.partial(_forge, _TENSOR[name], part, True)
    yield "signed: no tensors", functools.partial(_forge, lambda tensors, key: tensors.clear(), 0.0, True)
    for name, change in _STRANGE.items():
        yield f"signed: {name}", functools.partial(edit_manifest, change=change)


def _set(key: str, value: Any, folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update({key: value}))


def _name_file(path: str, folder: Path) -> None:
    tamper.outside(folder)
    told = tamper.manifest_of(folder)["files"][TENSORS]
    edit_manifest(folder, lambda manifest: manifest["files"].update({path: told}))


def _tell_file(word: str, told: Any, folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"][TENSORS].update({word: told}))


def _second_file(folder: Path) -> None:
    (folder / "second.bin").write_bytes(tamper.pickled(folder))
    edit_manifest(folder, lambda manifest: manifest["files"].update({"second.bin": {}}))
    resign(folder)


def _named_link(folder: Path) -> None:
    (folder / "second").symlink_to(tamper.outside(folder))
    edit_manifest(folder, lambda manifest: manifest["files"].update(second={}))
    resign(folder)


def _with_literal(text: bytes, literal: str) -> bytes:
    """A field with this literal, sealed as by a reader that accepts what Python's json accepts."""
    manifest = json.loads(text) | {"zzz": "?"}
    try:
        rest = {key: value for key, value in manifest.items() if key != "self"} | {"zzz": json.loads(literal)}
        dumped = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        manifest["self"] = hashlib.sha256(dumped.encode()).hexdigest()
    except (ValueError, RecursionError):
        pass
    return render(manifest).replace(b'"?"', literal.encode())


def _claim(length: int, folder: Path) -> None:
    tamper.rewrite(TENSORS, lambda data: length.to_bytes(8, "little") + data[8:], folder)
    resign(folder)


def _edit_header(change: Callable[[dict[str, Any], str], Any], folder: Path) -> None:
    header, data = header_of(folder)
    names = [key for key, entry in header.items() if key != "__metadata__" and 0 not in entry["shape"]]
    change(header, max(names))
    put_header(folder, header, data)
    resign(folder)


def _edit_header_text(change: Text, folder: Path) -> None:
    header, data = header_of(folder)
    put_header(folder, change(json.dumps(header).encode()), data)
    resign(folder)


def _edit_data(change: Text, folder: Path) -> None:
    header, data = header_of(folder)
    put_header(folder, header, change(data))
    resign(folder)


def _many(count: int) -> bytes:
    entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{i}{entry}' for i in range(count)) + "}").encode()


def _signed_pickle(protocol: int, folder: Path) -> None:
    (folder / TENSORS).write_bytes(tamper.pickled(folder, protocol))
    resign(folder)


def _signed_zip(folder: Path) -> None:
    tamper.zipped(folder, folder / TENSORS)
    resign(folder)


def _forge(change: Callable[[dict[str, Tensor], str], Any], part: float, table: bool, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: change(tensors, pick(tensors, part)))
    resign(folder, table=table)


def _poison(value: str, place: int, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[place] = float(value)


def _other_base(manifest: dict[str, Any]) -> None:
    for path in tuple(tamper.leaves(manifest["base"])):
        tamper.change_leaf(manifest["base"], path)
