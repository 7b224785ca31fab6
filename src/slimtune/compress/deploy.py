"""deploy: a model as a folder that onnxruntime or OpenVINO runs, with all that a program needs to use it.

    model.onnx, or model.xml and model.bin     the graph
    config.json                                transformers' own: labels, sizes
    slimtune-export.json                       inputs, labels, what was proved, versions, size and SHA-256 of each file

and whatever files the caller adds, such as a tokenizer's.
"""
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor, nn

from slimtune.compress.int8 import quantise_onnx
from slimtune.compress.isa import exact_int8, instruction_sets
from slimtune.compress.latency import versions
from slimtune.compress.onnx import export_onnx, open_onnx
from slimtune.compress.openvino import export_openvino, open_openvino
from slimtune.compress.traced import Proof, Run, Traced, prove
from slimtune.core.atomic import refuse_foreign, write_folder
from slimtune.core.manifest import RESTORE, read_manifest, verify_folder
from slimtune.errors import DeltaError, SlimtuneError

Target = Literal["onnx", "openvino"]
MANIFEST, FORMAT, FORMAT_VERSION = "slimtune-export.json", "slimtune-export", 1
_GRAPHS: dict[str, tuple[str, ...]] = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
_OPEN: dict[str, Callable[..., Run]] = {"onnx": open_onnx, "openvino": open_openvino}


@dataclass(frozen=True)
class Exported:
    """What was written. proof: shapes and largest difference; of int8 it is measured, and bounded by nothing.

    size: bytes of the graph; dense: of the model's parameters in float32.
    """

    folder: Path
    to: Target
    int8: bool
    proof: Proof
    size: int
    dense: int


@dataclass(frozen=True)
class Deployed:
    """An exported model, open: from a batch to logits.

    Shapes: inputs as the manifest names them, (B, T) or (B, 3, S, S); result (B, classes).
    """

    run: Run
    labels: tuple[str, ...]
    manifest: Mapping[str, Any]

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.run(inputs)


def export_model(model: nn.Module, folder: Path | str, batch: Mapping[str, Any], *, to: Target = "onnx",
                 int8: bool = False, files: Mapping[str, bytes] | None = None,
                 about: Mapping[str, Any] | None = None) -> Exported:
    """Write a model that classifies as one folder, in one step, after its graph gave what the model gives.

    A merged delta is in the weights; one that is attached goes into the graph as it runs. batch: an example of what
    the model will read. files: more files by name. about: plain data for the manifest.
    Errors: ExtraError without the extra `export`; SlimtuneError for what cannot be exported; TrainError for a graph
    that differs; DeltaError for a folder that holds something else.
    """
    if int8 and to != "onnx":
        raise SlimtuneError("int8 is written for onnxruntime: OpenVINO's needs nncf, which slimtune does not use.",
                            "Choose --to onnx, or leave int8 out.")
    folder = Path(folder)
    refuse_foreign(folder.absolute(), MANIFEST)  # before the graph is made, which takes a while
    with TemporaryDirectory() as home:
        proof = _graph(model, Path(home), batch, to, int8)
        names = _GRAPHS[to]
        dense = sum(4 * p.numel() for p in model.parameters())
        config: Any = getattr(model, "config", None)
        labels = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
        subject = Traced(model, batch)
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, "to": to, "int8": int8,
                "weight_bits": (8 if exact_int8() else 7) if int8 else 32, "class": type(model).__name__,
                "inputs": {name: str(value.dtype).removeprefix("torch.") for name, value in subject.inputs.items()},
                "fixed": subject.fixed, "labels": labels, "proof": asdict(proof), "dense_bytes": dense,
                "instruction_sets": instruction_sets(), "versions": versions(), "about": dict(about or {})}
        content: dict[str, Any] = {**(files or {}), "config.json": b"{}" if config is None else
                                   config.to_json_string().encode()}
        content |= {name: functools.partial(_copy, Path(home, name)) for name in names}
        write_folder(folder, content, body, manifest_name=MANIFEST)
    return Exported(folder, to, int8, proof, sum((folder / name).stat().st_size for name in names), dense)


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def _graph(model: nn.Module, home: Path, batch: Mapping[str, Any], to: Target, int8: bool) -> Proof:
    if to == "openvino":
        return export_openvino(model, home / "model.xml", batch)
    if not int8:
        return export_onnx(model, home / "model.onnx", batch)
    export_onnx(model, home / "float32.onnx", batch)
    quantise_onnx(home / "float32.onnx", home / "model.onnx")
    return prove(Traced(model, batch), open_onnx(home / "model.onnx"), None)


def open_exported(folder: Path | str, threads: int | None = None) -> Deployed:
    """Open a folder of `export_model`, verified byte for byte. threads: by default as many as torch's.

    Errors: ExtraError without the runtime; DeltaError for a folder that does not verify.
    """
    folder = Path(folder)
    read_manifest(folder, manifest_name=MANIFEST, first=functools.partial(_check, folder))
    manifest = verify_folder(folder, manifest_name=MANIFEST)
    to = manifest["to"]
    run = _OPEN[to](folder / _GRAPHS[to][0], threads)
    return Deployed(run, tuple(manifest.get("labels") or ()), manifest)


def _check(folder: Path, manifest: Mapping[str, Any]) -> None:
    version, names = manifest.get("format_version"), manifest.get("files")
    if manifest.get("format") != FORMAT or type(version) is not int or manifest.get("to") not in _GRAPHS:
        raise DeltaError(f"{folder}: {MANIFEST} is not of an exported model.", RESTORE)
    if version > FORMAT_VERSION:
        raise DeltaError(f"{folder}: format version {version}, written by a newer slimtune; this one reads up to "
                         f"{FORMAT_VERSION}.", "Upgrade: pip install -U slimtune")
    if not isinstance(names, dict) or not set(_GRAPHS[manifest["to"]]) <= set(names):
        raise DeltaError(f"{folder}: {MANIFEST} names no graph.", RESTORE)
