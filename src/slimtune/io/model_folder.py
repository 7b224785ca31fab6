"""A model in a folder of ours: one whose layers have widths of their own, which no config of transformers can state.

    config.json              transformers' own, of the model before it was cut
    slimtune.safetensors     every tensor, once
    slimtune-model.json      what differs from the config (see structure.py), size and SHA-256 of each file

The weights do not bear the name that transformers looks for: of a cut model it would say so, but of a factored or
emptied one it would draw the missing weights at random and go on. So `from_pretrained` finds no weights and says that.
"""
import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core import deltas
from slimtune.core.atomic import recover, write_folder
from slimtune.core.manifest import RESTORE, parse_json, read_folder, read_manifest
from slimtune.core.sites import join
from slimtune.core.tensorfile import (
    check_finite,
    described,
    header,
    load_tensors,
    save_tensors,
    slimtune_version,
    storable,
)
from slimtune.errors import DeltaError, listing
from slimtune.io.structure import difference, meta_like, put_tensors, rebuild, tensors_of

MANIFEST, TENSORS, CONFIG, GENERATION = ("slimtune-model.json", "slimtune.safetensors", "config.json",
                                         "generation_config.json")
FORMAT, FORMAT_VERSION = "slimtune-model", 1


def save_model(model: nn.Module, folder: Path | str, tokenizer: Any = None, *, overwrite: bool = True) -> None:
    """Write a model of transformers, shrunk or not, as one folder, in one step; `load_model` reads it.

    tokenizer: a tokenizer, image processor or transform, or a list of them, that is written beside it.
    Errors: DeltaError for a model with deltas attached, one that is not of transformers, modules that could not be
    made again, a value that is not finite, and a folder that holds something else.
    Example:
        >>> import tempfile
        >>> from slimtune.io.models import load_model
        >>> from slimtune.sparsity.shrink import shrink
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> report = shrink(model, keep={"encoder.0.attn.heads": [1]})
        >>> with tempfile.TemporaryDirectory() as home:
        ...     save_model(model, home + "/small")
        ...     load_model(home + "/small").bert.encoder.layer[0].attention.self.query
        Linear(in_features=32, out_features=8, bias=True)
    """
    folder, config = Path(folder), getattr(model, "config", None)
    if found := deltas(model):
        raise DeltaError(f"the model has deltas attached: {listing(found)}.",
                         "Fold them in with shrink(), or save them apart with delta.save() and detach them.")
    if not hasattr(config, "to_json_string") or not type(model).__module__.startswith("transformers."):
        raise DeltaError(f"{type(model).__name__} is no model of transformers, and could not be made again.",
                         "Save its state_dict with safetensors.")
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeltaError(f"{folder}: is there already.", "Choose another folder, or pass overwrite=True.")
    structure = difference(model, meta_like(model, config))
    tensors = storable(tensors_of(model), folder)
    check_finite(tensors, folder, "It was not saved.")
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "slimtune": slimtune_version(),
            "class": type(model).__name__, "base": base_path(model),
            "structure": structure.as_dict(), "tensors": described(tensors)}
    files: dict[str, Any] = {**_beside(tokenizer, folder), CONFIG: _config(model),
                             TENSORS: functools.partial(save_tensors, tensors)}
    if (generation := getattr(model, "generation_config", None)) is not None:
        files[GENERATION] = generation.to_json_string().encode()
    write_folder(folder, files, body, manifest_name=MANIFEST)


def _config(model: Any) -> bytes:
    told = json.loads(model.config.to_json_string())
    return (json.dumps({**told, "architectures": [type(model).__name__]}, indent=2, sort_keys=True) + "\n").encode()


def _beside(tokenizer: Any, folder: Path) -> dict[str, bytes]:
    """The files of tokenizers and processors. Errors: DeltaError for folders among them."""
    files = {}
    for one in tokenizer if isinstance(tokenizer, Sequence) else [tokenizer] if tokenizer is not None else []:
        with tempfile.TemporaryDirectory() as home:
            one.save_pretrained(home)
            for path in sorted(Path(home).iterdir()):
                if not path.is_file() or path.name == CONFIG:
                    raise DeltaError(f"{folder}: the tokenizer writes {path.name}, which has no place in this folder.")
                files[path.name] = path.read_bytes()
    return files


def is_model_folder(source: Path | str) -> bool:
    """Whether a model's folder was written by `save_model`; one whose saving was killed is tidied first."""
    if not isinstance(source, Path):
        return False
    if not source.exists():
        recover(source, manifest_name=MANIFEST)
    return (source / MANIFEST).is_file()


def read_model(folder: Path, *, shapes_only: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a folder, verified byte for byte; shapes_only: no tensors.

    Errors: DeltaError that names the file and what is wrong with it.
    """
    check = functools.partial(_check_format, folder)
    if shapes_only:
        manifest, tensors = read_manifest(folder, manifest_name=MANIFEST, first=check), {}
    else:
        manifest, files = read_folder(folder, manifest_name=MANIFEST, first=check)
        if TENSORS not in files or CONFIG not in files:
            raise DeltaError(f"{folder}: {MANIFEST} names {listing(sorted(files)) or 'no file'}.",
                             f"A model has {CONFIG} and {TENSORS}.", RESTORE)
        if (found := header(files[TENSORS], folder / TENSORS)) != (told := manifest.get("tensors")):
            odd = [n for n in found if not isinstance(told, dict) or told.get(n) != found[n]] or sorted(told or ())
            raise DeltaError(f"{folder}: {TENSORS} does not hold the tensors that {MANIFEST} names.",
                             f"They differ at: {listing(odd, 3)}.", RESTORE)
        tensors = load_tensors(files[TENSORS], folder / TENSORS)
        check_finite(tensors, folder, RESTORE)
        parse_json(files[CONFIG], str(folder / CONFIG))
    if not isinstance(manifest.get("class"), str) or not isinstance(manifest.get("tensors"), dict) \
            or not isinstance(manifest.get("structure"), dict):
        raise DeltaError(f"{folder}: {MANIFEST} does not say what the model is.", RESTORE)
    return manifest, tensors


def _check_format(folder: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("format_version")
    if manifest.get("format") != FORMAT or type(version) is not int or version < 1:
        raise DeltaError(f"{folder}: {MANIFEST} has format {manifest.get('format')!r}, version {version!r}, not "
                         f"{FORMAT!r} from 1.", "It was not written by slimtune, or was changed.", RESTORE)
    if version > FORMAT_VERSION:
        raise DeltaError(f"{folder}: format version {version}, written by a newer slimtune "
                         f"({str(manifest.get('slimtune'))[:40]}); this one reads up to {FORMAT_VERSION}.",
                         "Upgrade: pip install -U slimtune")


def renamed(path: str, old: str, new: str) -> str | None:
    """A saved path in a model of the same family whose backbone stands at `new` and not at `old`.

    None for what stands beside the backbone, where the model is one alone.
    Example:
        >>> renamed("bert.encoder", "bert", ""), renamed("encoder", "", "bert"), renamed("classifier", "bert", "")
        ('encoder', 'bert.encoder', None)
    """
    if old == new:
        return path
    if not old:
        return join(new, path)
    inside = path.removeprefix(old).removeprefix(".") if f"{path}.".startswith(f"{old}.") else None
    return inside if not new else path if inside is None else join(new, inside)


def base_path(model: nn.Module) -> str:
    """Where the backbone stands in a model of transformers; nothing for one that is its own."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def fill(model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path,
         keep_dtype: bool = False) -> dict[str, list[str]]:
    """Make a plain model of a folder's config the one that was saved.

    Returns the names of what the folder does not have, or has in other shapes, as transformers reports them.
    Errors: DeltaError where the folder does not fit the model.
    """
    old, new = str(manifest.get("base")), base_path(model)

    def rename(path: str) -> str | None:
        return renamed(path, old, new)

    rebuild(model, manifest["structure"], rename, str(folder))
    shapes = {n: shape for name, shape in manifest["structure"]["shapes"].items() if (n := rename(name)) is not None}
    if model.device.type == "meta":  # type: ignore[union-attr]
        tensors = {name: torch.empty(told["shape"], device="meta") for name, told in manifest["tensors"].items()}
    given = {n: t for name, t in tensors.items() if (n := rename(name)) is not None}
    missing, misfit = put_tensors(model, given, shapes, keep_dtype)
    if missing and type(model).__name__ == manifest["class"]:
        raise DeltaError(f"{folder}: holds no {missing[0]}, which its {manifest['class']} has.", RESTORE)
    return {"missing_keys": missing, "mismatched_keys": misfit}
