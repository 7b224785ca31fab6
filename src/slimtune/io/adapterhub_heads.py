"""AdapterHub's heads: those of transformers' classes, and the library's own layers in a row, as heads of our model."""
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.anatomy import Anatomy
from slimtune.core.insert import CHILD, Root
from slimtune.core.unfreeze import base_parameters
from slimtune.errors import DeltaError, listing
from slimtune.io.adapterhub_folder import HEAD_CONFIG
from slimtune.io.delta_folder import NOTHING

ALONE = f"To load the adapter alone, take {HEAD_CONFIG} and the head's tensors out of the folder."
ENDINGS = {"classification": "ForSequenceClassification", "image_classification": "ForImageClassification",
           "tagging": "ForTokenClassification", "question_answering": "ForQuestionAnswering",
           "causal_lm": "LMHeadModel", "seq2seq_lm": "ForConditionalGeneration"}
"""The library's types of heads, and how the classes of transformers end that have one."""

Variant = tuple[dict[str, Any], dict[int, str]]
_ONE: dict[str, Any] = {"layers": 1}
_TANH: dict[str, Any] = {"layers": 2, "activation_function": "tanh", "use_pooler": False}
_TWO: Variant = (_TANH, {1: "classifier.dense", 4: "classifier.out_proj"})
_BART: Variant = (_TANH, {1: "classification_head.dense", 4: "classification_head.out_proj"})
_LM: Variant = ({**_ONE, "layer_norm": False}, {0: "lm_head"})
VARIANTS: dict[tuple[str, str], tuple[Variant, ...]] = {
    ("bert", "classification"): (({**_ONE, "use_pooler": True}, {1: "classifier"}),
                                 (_TANH, {1: "bert.pooler.dense", 4: "classifier"})),
    ("roberta", "classification"): (_TWO,), ("xlm-roberta", "classification"): (_TWO,),
    ("electra", "classification"): (({**_TANH, "activation_function": "gelu"}, _TWO[1]),),
    ("distilbert", "classification"): (({**_TANH, "activation_function": "relu"},
                                        {1: "pre_classifier", 4: "classifier"}),),
    ("bart", "classification"): (_BART,),
    ("vit", "image_classification"): (({**_ONE, "use_pooler": False}, {1: "classifier"}),),
    **{(family, "tagging"): ((_ONE, {1: "classifier"}),)
       for family in ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2")},
    **{(family, "question_answering"): ((_ONE, {1: "qa_outputs"}),)
       for family in ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2", "bart", "mbart")},
    **{(family, "seq2seq_lm"): (_LM,) for family in ("t5", "bart", "mbart")},
}
"""A family's heads: what the config must say, and the module of our model that each numbered layer is."""


def fits(config: Mapping[str, Any], needs: Mapping[str, Any]) -> bool:
    return all(config.get(key, key == "bias") == value for key, value in needs.items())


def read_head_state(model: nn.Module, anatomy: Anatomy, head: tuple[dict[str, Any], dict[str, Tensor]],
                    adapter: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """{path: value} of the head's parameters, the pooler's where the head has one of its own; empty for a model
    without a task head.

    Errors: DeltaError for a head that this model's class has no counterpart of, and for one that is a part of the
    backbone (a language model's) and was trained.
    """
    config, tensors = head
    where = f"{where}: {HEAD_CONFIG}"
    named = {k: v for k, v in tensors.items() if k not in adapter}
    own = isinstance(config.get("config"), dict)
    paths = _modules(model, anatomy, config, named, where) if own else _static(model, anatomy, config, named, where)
    if paths is None:
        warnings.warn(f"{where}: its head is left out: {type(model).__name__} has no place for it.", stacklevel=4)
        return {}
    state: dict[str, Tensor] = {**model.state_dict(), **_bases(model)}
    parameters = base_parameters(model)
    heads = (*anatomy.heads, f"{anatomy.base}.pooler")
    found: dict[str, Tensor] = {}
    for path, value in paths.items():
        if any(path.startswith(f"{h}.") for h in heads) and path in parameters:
            found[path] = value
        elif path not in state:
            raise DeltaError(f"{where}: {path} is no tensor of this {type(model).__name__}.", ALONE, NOTHING)
        elif not _equal(state[path], value):
            raise DeltaError(f"{where}: {path} is of the backbone, and differs from this model's.",
                             "It was trained, or is another model's.", ALONE, NOTHING)
    missing = [p for p in parameters if any(p.startswith(f"{h}.") for h in anatomy.heads) and p not in found]
    if missing:
        raise DeltaError(f"{where}: there is no tensor for {missing[0]}.", f"There are: {listing(found, 6) or 'none'}.",
                         ALONE, NOTHING)
    return found


def _bases(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's own tensors where a delta that runs has put others."""
    root = model._modules.get(CHILD)
    return {o.path: o.base for d in (root.deltas.values() if isinstance(root, Root) else ()) for o in d.owned}


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.detach().cpu().float(), theirs.float())


def _static(model: nn.Module, anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
            where: str) -> dict[str, Tensor] | None:
    """A head of transformers' own class: its keys are paths."""
    if config.get("model_class") != type(model).__name__:
        if not anatomy.heads:
            return None
        raise DeltaError(f"{where}: the head is of {str(config.get('model_class'))[:60]}, and this model is "
                         f"{type(model).__name__}.", "Load that class. " + ALONE, NOTHING)
    return dict(tensors)


def _modules(model: nn.Module, anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
             where: str) -> dict[str, Tensor] | None:
    """A head of the library's: `heads.<name>.<number>.<parameter>`."""
    fields, own = config["config"], type(model).__name__
    kind = str(fields.get("head_type"))
    same = own.endswith(ENDINGS.get(kind, "?"))
    bare = "For" not in own and "LMHead" not in own
    if not same and not anatomy.heads and (bare or not kind.endswith("_lm")):
        return None
    variants = VARIANTS.get((anatomy.model_type, kind), ()) if same else ()
    modules = next((modules for needs, modules in variants if fits(fields, needs)), None)
    if modules is None:
        said = ", ".join(f"{k}={fields[k]!r}" for k in ("head_type", "layers", "activation_function", "use_pooler",
                                                        "bias") if k in fields)
        raise DeltaError(f"{where}: {own} has no head like this: {said}.", ALONE, NOTHING)
    prefix, found = f"heads.{config.get('name')}.", {}
    for key, value in tensors.items():
        number, _, parameter = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not number.isdigit() or int(number) not in modules:
            raise DeltaError(f"{where}: {key} belongs to nothing that the config names.", ALONE, NOTHING)
        found[f"{modules[int(number)]}.{parameter}"] = value
    return found


def write_head(model: nn.Module, anatomy: Anatomy, name: str, values: Mapping[str, Tensor],
               top: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a head: of transformers' class; of the library's own when it has a pooler of its own."""
    labels = {str(k): int(v) for k, v in (getattr(model.config, "label2id", None) or {}).items()}  # type: ignore
    if not any(path.startswith(f"{anatomy.base}.pooler.") for path in values):
        return {**top, "config": None, "name": None, "label2id": labels, "num_labels": len(labels)}, dict(values)
    kind = next((k for k, ending in ENDINGS.items() if type(model).__name__.endswith(ending)), "")
    for needs, modules in VARIANTS.get((anatomy.model_type, kind), ()):
        numbers = {path: number for number, path in modules.items()}
        if {p.rpartition(".")[0] for p in values} == set(numbers):
            fields = {"head_type": kind, "bias": True, "dropout_prob": None, "label2id": labels,
                      "num_labels": len(labels), **needs}
            family = type(model).__name__.removesuffix(ENDINGS[kind])
            keys = {p: f"heads.{name}.{numbers[p.rpartition('.')[0]]}.{p.rpartition('.')[2]}" for p in values}
            return ({**top, "config": fields, "model_class": f"{family}AdapterModel"},
                    {keys[p]: value for p, value in values.items()})
    raise DeltaError(f"AdapterHub has no head with a pooler for {type(model).__name__}.",
                     "Train without pooler=True, or keep the delta in slimtune's own folder.")
