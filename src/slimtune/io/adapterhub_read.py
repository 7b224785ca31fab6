"""Load an AdapterHub folder onto a model as one of our deltas: every flag read or refused, every tensor used."""
import re
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.core.anatomy import dissect
from slimtune.core.attach import attach
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD, Root
from slimtune.core.labels import Labels
from slimtune.errors import DeltaError, SlimtuneError
from slimtune.io.adapterhub_bottleneck import read_bottleneck
from slimtune.io.adapterhub_config import Bottleneck, Lora, Prefix, check_inverse, read_parts
from slimtune.io.adapterhub_folder import read_adapter, read_head
from slimtune.io.adapterhub_heads import read_head_state
from slimtune.io.adapterhub_linear import read_lora, read_prefix
from slimtune.io.adapterhub_names import Hub
from slimtune.io.adapterhub_parts import Ledger, Read, assemble
from slimtune.io.delta_folder import CONFIG, NOTHING


def load_adapterhub(model: nn.Module, folder: Path | str, name: str | None = None,
                    labels: Labels = "model") -> Delta:
    """The delta of a folder of the `adapters` library, attached and active: bottlenecks with any projection, LoRA,
    (IA)^3, prefixes, and unions of them; with the head that was saved beside it.

    Its flags decide which of our methods it becomes (see adapterhub_bottleneck.py). In evaluation the logits are
    the library's. Under scaled dot-product attention `adapters` 1.3.0 masks its own prefix out on GPT-2 and BART;
    here it is seen, as under the library's eager attention.

    Errors: DeltaError for a malformed folder, a flag that is not supported, a tensor that is missing, left over, of
    another shape or not finite; the model is left as it was.
    Example:
        >>> from slimtune.testing import tiny
        >>> load_adapterhub(tiny("bert"), "no/such/folder")
        Traceback (most recent call last):
        slimtune.errors.DeltaError: no/such/folder: adapter_config.json could not be read (No such file or directory).
          There is: nothing.
          Nothing was loaded.
    """
    where = str(folder)
    config, tensors = read_adapter(folder)
    root = model._modules.get(CHILD)
    anatomy = (root.anatomy if isinstance(root, Root) else None) or dissect(model)
    hub = Hub(anatomy, where)
    saved = _names(config, hub, where)
    parts = read_parts(config, where)
    for part in parts:
        if isinstance(part, Bottleneck):
            check_inverse(part, config.get("type"), list(tensors), where)
    ledger = Ledger(tensors, hub, saved, where)
    reads: list[Read] = []
    try:
        for part in parts:
            reads += (read_bottleneck(hub, ledger, part) if isinstance(part, Bottleneck) else
                      read_lora(hub, ledger, part) if isinstance(part, Lora) else
                      read_prefix(hub, ledger, part) if isinstance(part, Prefix) else [])
        ledger.finish()
        methods, state = assemble(reads)
        head = read_head(folder)
        found = read_head_state(model, anatomy, head, tensors, where) if head is not None else {}
        if found:
            state |= {f"head.{path}": value for path, value in found.items()}
            pooled = any(path.startswith(f"{anatomy.base}.pooler.") for path in found)
            methods[0] = methods[0].model_copy(update={"head": "train", "pooler": pooled})
        delta = attach(model, methods, name or re.sub(r"[^A-Za-z0-9_-]", "_", saved)[:100] or "default",
                       anatomy=anatomy, state=state, labels=labels)
    except DeltaError as error:
        what = error.what if error.what.startswith(where) else f"{where}: {error.what}"
        raise DeltaError(what, *error.more) from None
    except SlimtuneError as error:
        raise DeltaError(f"{where}: {error.what}", *error.more, NOTHING) from None
    delta.info = {"adapterhub": {k: v for k in ("name", "version", "model_name", "model_class", "model_type")
                                 if isinstance(v := config.get(k), str)}}
    return delta


def _names(config: dict[str, Any], hub: Hub, where: str) -> str:
    """The adapter's name. Errors: DeltaError without one, and for an adapter of another family."""
    name, family = config.get("name"), config.get("model_type")
    if not isinstance(name, str) or not name:
        raise DeltaError(f"{where}: {CONFIG}: 'name' is no text.", NOTHING)
    if family is not None and family != hub.anatomy.model_type:
        raise DeltaError(f"{where}: {CONFIG}: it was made for {str(family)[:60]}, and this model is "
                         f"{hub.anatomy.model_type}.", "Load the model it was trained on. " + NOTHING)
    return name
