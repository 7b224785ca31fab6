"""export: a run, or a model with a head, as a folder that onnxruntime or OpenVINO runs."""
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.compress.deploy import Exported, Target, export_model
from slimtune.core import deltas
from slimtune.data.transform import Transform
from slimtune.errors import MethodError, RecipeError, listing
from slimtune.io.images import load_image_input
from slimtune.io.models import find_model, load_model, load_tokenizer
from slimtune.recipe.folder import RECIPE, open_run
from slimtune.recipe.use import load_run

TASKS = ("classification", "regression", "token_classification", "image_classification")
_TEXTS = ("A text as an example.", "Another one, which is a few words longer than the first.")
_PREPROCESSOR = "preprocessor_config.json"


def export(source: Path | str, target: Path | str | None = None, to: Target = "onnx", int8: bool = False) -> Exported:
    """Write the model of a run, its delta merged where that is possible, or of a model's folder.

    target: by default beside the source, `NAME-onnx`, `NAME-onnx-int8` or `NAME-openvino`. A delta that is no change
    of weights goes into the graph as it runs.
    Errors: RecipeError for neither a run nor a model, or a task that does not classify; as `export_model`.
    """
    path = Path(source).expanduser()
    folder = Path(f"{path}-{to}{'-int8' if int8 else ''}" if target is None else target).expanduser()
    model, batch, files, about = _run(path) if (path / RECIPE).is_file() else _model(path, str(source))
    return export_model(model, folder, batch, to=to, int8=int8, files=files, about=about)


Parts = tuple[nn.Module, dict[str, Any], dict[str, bytes], dict[str, Any]]


def _run(path: Path) -> Parts:
    _, recipe = open_run(path)
    task = recipe.data.task
    if task not in TASKS:
        raise RecipeError(f"{path}: a run of {task} cannot be exported; it writes text a token at a time.",
                          f"Exported are: {listing(TASKS)}")
    tuned = load_run(path)
    how = []
    for delta in deltas(tuned.model).values():
        try:
            delta.merge()
            how.append("merged")
        except MethodError:
            how.append("in the graph")
    about: dict[str, Any] = {"task": task, "delta": ", ".join(how), "max_length": recipe.data.max_length}
    if isinstance(tuned.tokenizer, Transform):
        about |= {"reads": asdict(tuned.tokenizer.plain()), "max_length": None}
        batch = _images(tuned.tokenizer.collate, tuned.tokenizer.size)
    else:
        batch = _texts(tuned.tokenizer, recipe.data.pair is not None)
    return tuned.model, batch, _files(recipe.model, tuned.tokenizer), about


def _model(path: Path, name: str) -> Parts:
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: neither a run nor a model: it has no {RECIPE} and no config.json.",
                          f"It has: {listing(sorted(p.name for p in path.iterdir()), 12) or 'nothing'}")
    model = load_model(name)
    if not type(model).__name__.endswith("Classification"):
        raise RecipeError(f"{name}: a {type(model).__name__} has no head that classifies.",
                          "Give the folder of a run, or of a model with a head, as save_model writes it.")
    if model.main_input_name == "pixel_values":
        side = load_image_input(name).positions or 224
        return model, _pixels(side), _files(name, None), {"task": "image_classification"}
    tokenizer = load_tokenizer(name)
    return model, _texts(tokenizer, False), _files(name, tokenizer), {"max_length": _most(tokenizer)}


def _most(tokenizer: Any) -> int | None:
    """The longest text a tokenizer makes; a huge number stands for none."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else None


def _texts(tokenizer: Any, pair: bool) -> dict[str, Any]:
    second = {"text_pair": list(reversed(_TEXTS))} if pair else {}
    return dict(tokenizer(list(_TEXTS), padding=True, return_tensors="pt", **second))


def _pixels(side: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))}


def _images(collate: Any, side: int) -> dict[str, Any]:
    """A batch as the run's transform makes it, of random bytes."""
    g = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randint(0, 256, (3, side, side), generator=g, dtype=torch.uint8)} for _ in range(2)]
    return {key: value for key, value in collate(rows).items() if key != "labels"}


def _files(model: str, tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer, or of an image processor, by name."""
    found = find_model(model)
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as home:
            tokenizer.save_pretrained(home)
            return {p.name: p.read_bytes() for p in sorted(Path(home).iterdir()) if p.is_file()}
    own = Path(found, _PREPROCESSOR) if isinstance(found, Path) else None
    return {_PREPROCESSOR: own.read_bytes()} if own is not None and own.is_file() else {}
