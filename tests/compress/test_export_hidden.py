"""Graphs of models whose stream was narrowed: the same logits, in onnxruntime and in 8 bits."""
from importlib.util import find_spec

import pytest
import torch

import slimtune as st
from slimtune.compress.int8 import quantise_onnx
from slimtune.compress.onnx import export_onnx, open_onnx
from slimtune.testing import batch, output, tiny

pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
                                reason="needs slimtune[export]")


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_narrowed_model_and_its_graph(family: str, tmp_path):
    import onnx
    model = tiny(family)
    tower = st.dissect(model).towers[0].name
    keep = {f"{tower}.hidden": range(3, 24), f"{tower}.0.attn.heads": [1], f"{tower}.1.mlp.act": range(9)}
    st.shrink(model, keep=keep)
    st.save_model(model, tmp_path / "small")
    model = st.load_model(tmp_path / "small")
    export_onnx(model, tmp_path / "model.onnx", batch(family))
    inputs = batch(family, 2, seed=7, labels=False)
    with torch.no_grad():
        told = output(model, inputs)
    torch.testing.assert_close(open_onnx(tmp_path / "model.onnx")(inputs), told, rtol=0, atol=1e-5)
    sizes = {n for t in onnx.load(tmp_path / "model.onnx").graph.initializer for n in t.dims}
    assert 21 in sizes
    quantise_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    now = open_onnx(tmp_path / "int8.onnx")(inputs)
    assert (now - told).abs().max() < 0.1 * told.abs().max()
