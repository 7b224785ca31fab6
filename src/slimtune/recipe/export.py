"""export: a run, or a model with a head, as a folder that onnxruntime or OpenVINO runs."""
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.compress.deploy import Exported, Target, export_model
from slimtune.core import deltas
from slimtune.data.spec import IMAGES, DataSpec
from slimtune.data.transform import Transform
from slimtune.errors import MethodError, RecipeError, listing
from slimtune.io.models import load_model, load_tokenizer
from slimtune.recipe.folder import RECIPE, no_run, open_run
from slimtune.recipe.reader import reader
from slimtune.recipe.use import load_run

TASKS = ("classification", "regression", "token_classification", *IMAGES)
_TEXTS = ("A text as an example.", "Another one, which is a few words longer than the first.")


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
        batch = _images(tuned.tokenizer)
    else:
        batch = _texts(tuned.tokenizer, recipe.data.pair is not None)
    return tuned.model, batch, _files(tuned.tokenizer), about


def _model(path: Path, name: str) -> Parts:
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(f"{path}: neither a run nor a model: it has no {RECIPE} and no config.json.",
                          f"It has: {listing(sorted(p.name for p in path.iterdir()), 12) or 'nothing'}",
                          *no_run(path).more)
    if path.is_file():
        raise RecipeError(f"{path}: a file, and neither a run nor a model.", *no_run(path).more,
                          "Give the folder of a finished run, or of a model.")
    model = load_model(name)
    if not type(model).__name__.endswith("Classification"):
        raise RecipeError(f"{name}: a {type(model).__name__} has no head that classifies.",
                          "Give the folder of a run, or of a model with a head, as save_model writes it.")
    if model.main_input_name == "pixel_values":
        spec = DataSpec(task="image_classification", test=name)  # whatever a preprocessor says, and nothing else
        transform = reader(name, spec)
        return model, _images(transform), _files(transform), {"task": spec.task, "reads": asdict(transform)}
    tokenizer = load_tokenizer(name)
    return model, _texts(tokenizer, False), _files(tokenizer), {"max_length": _most(tokenizer)}


def _most(tokenizer: Any) -> int | None:
    """The longest text a tokenizer makes; a huge number stands for none."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else None


def _texts(tokenizer: Any, pair: bool) -> dict[str, Any]:
    second = {"text_pair": list(reversed(_TEXTS))} if pair else {}
    return dict(tokenizer(list(_TEXTS), padding=True, return_tensors="pt", **second))


def _images(transform: Transform) -> dict[str, Any]:
    """A batch as the transform makes it, of random bytes."""
    g, shape = torch.Generator().manual_seed(0), (3, transform.size, transform.size)
    return transform.collate([{"pixel_values": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)}
                              for _ in range(2)])


def _files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer, or of a transform of images, by name."""
    with tempfile.TemporaryDirectory() as home:
        tokenizer.save_pretrained(home)
        return {p.name: p.read_bytes() for p in sorted(Path(home).iterdir()) if p.is_file()}
