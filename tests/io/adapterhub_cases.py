"""Shared by the tests of AdapterHub's folders: what the real library saved, its bases, inputs and logits."""
import functools
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import slimtune
from slimtune.core.fingerprint import bits_digest

HOME = Path(__file__).parent / "adapterhub"
CONFIG = "adapter_config.json"
CASES = sorted((p.parent.parent.name, p.parent.name) for p in HOME.glob(f"*/*/{CONFIG}"))
REFUSED = ("t5", "prefix")
READ = [case for case in CASES if case != REFUSED]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@functools.cache
def values(family):
    """The inputs and the logits that the library gave."""
    return load_file(HOME / family / "expected.safetensors")


def base(family, cls=None, **changes):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = HOME / family / "base"
    name = cls or json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **changes).eval()


@torch.no_grad()
def logits(model, family):
    return model(**{k.removeprefix("inputs."): v for k, v in values(family).items() if k.startswith("inputs.")}).logits


def copy(family, case, home):
    """A case's folder, to be changed."""
    return Path(shutil.copytree(HOME / family / case, home / case))


def change(folder, top=None, name=CONFIG, **fields):
    """Change fields of the inner config, or of the file itself; `...` takes one out."""
    whole = json.loads((folder / name).read_text())
    for into, changes in ((whole["config"], fields), (whole, top or {})):
        for key, value in changes.items():
            into.pop(key, None)
            if value is not ...:
                into[key] = value
    (folder / name).write_text(json.dumps(whole))


def refused(folder, match, family="bert", model=None):
    """Loading fails with this message, says where, and leaves the model as it was."""
    import pytest

    from slimtune.errors import DeltaError

    model = base(family) if model is None else model
    before, modules = bits_digest(model), [name for name, _ in model.named_modules()]
    with pytest.raises(DeltaError, match=match) as caught:
        slimtune.load(model, folder)
    assert str(folder) in str(caught.value)
    assert bits_digest(model) == before
    assert [name for name, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.config._attn_implementation.startswith("slimtune")
