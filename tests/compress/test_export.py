"""Graphs for onnxruntime and OpenVINO: the same logits on shapes they were not traced with, or nothing is written."""
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.compress import export_model, extra, open_exported
from slimtune.compress.int8 import quantise_onnx
from slimtune.compress.onnx import export_onnx, open_onnx
from slimtune.compress.openvino import export_openvino, open_openvino
from slimtune.compress.traced import Traced, prove, resized, shapes_to_try
from slimtune.errors import DeltaError, ExtraError, SlimtuneError, TrainError
from slimtune.testing import batch, output, randomize, tiny

pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime",
                                                                         "openvino")), reason="needs slimtune[export]")


def feed(rows: int, tokens: int, seed: int = 5) -> dict[str, torch.Tensor]:
    return batch("bert", rows, seed=seed, labels=False, tokens=tokens)


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """(model, ONNX, OpenVINO) of a BERT with other heads and neurons in each block."""
    home, model = tmp_path_factory.mktemp("graphs"), tiny("bert")
    st.shrink(model, keep={"encoder.0.attn.heads": [0, 2, 3], "encoder.1.attn.heads": [1],
                           "encoder.0.mlp.act": range(24), "encoder.1.mlp.act": range(40, 51)})
    model.train()
    first = export_onnx(model, home / "model.onnx", batch("bert"))
    proof = export_openvino(model, home / "model.xml", batch("bert"), onnx=home / "model.onnx")
    assert model.training
    assert first.shapes == proof.shapes
    assert model.config._attn_implementation == "sdpa"
    assert max(first.difference, proof.difference) <= 1e-4
    assert len(set(proof.shapes)) >= 3
    assert sorted(p.name for p in home.iterdir()) == ["model.bin", "model.onnx", "model.xml"]
    return model.eval(), home / "model.onnx", home / "model.xml"


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (1, 17), (4, 5), (9, 31)])
def test_a_shrunk_model_on_shapes_it_was_not_traced_with(shrunk, runtime, rows, tokens):
    model, onnx, openvino = shrunk
    run = open_onnx(onnx, threads=1) if runtime == "onnx" else open_openvino(openvino, threads=1)
    inputs = feed(rows, tokens)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs), output(model, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seven", [False, True])
def test_int8_holds_weights_of_8_or_7_bits_and_a_scale_a_column(shrunk, tmp_path, seven):
    import onnx
    from onnx import numpy_helper

    model, graph, _ = shrunk
    quantise_onnx(graph, tmp_path / "int8.onnx", reduce_range=seven)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    matrices = [t for t in tensors.values() if t.dtype.name == "int8" and t.ndim == 2]
    assert len(matrices) >= 12  # four and two maps a block
    assert max(abs(int(t.max())) for t in matrices) == (64 if seven else 127)
    assert not [t for t in tensors.values() if t.dtype.name == "float32" and t.ndim == 2 and t.size > 1024]
    inputs = feed(4, 9)
    with torch.no_grad():
        told, now = output(model, inputs), open_onnx(tmp_path / "int8.onnx")(inputs)
    assert 0 < float((told - now).abs().max()) < 0.05 * float(told.abs().max())


def test_a_vit_and_its_folder(tmp_path):
    model, inputs = tiny("vit"), batch("vit")
    done = export_model(model, tmp_path / "vit", inputs, files={"notes.txt": b"x"}, about={"task": "image"})
    assert done.size == (tmp_path / "vit" / "model.onnx").stat().st_size
    assert done.dense == 4 * sum(p.numel() for p in model.parameters())
    opened = open_exported(tmp_path / "vit")
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(opened(pixel_values=pixels), model(pixel_values=pixels).logits, rtol=0, atol=1e-4)
    told = json.loads((tmp_path / "vit" / "slimtune-export.json").read_text())
    assert opened.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert told["inputs"] == {"pixel_values": "float32"}
    assert set(told["files"]) == {"model.onnx", "config.json", "notes.txt"}
    assert told["files"]["model.onnx"]["size"] == done.size
    with (tmp_path / "vit" / "model.onnx").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(DeltaError, match="SHA-256"):
        open_exported(tmp_path / "vit")


def test_a_delta_that_is_no_change_of_weights_is_in_the_graph(tmp_path):
    model, inputs = tiny("bert"), batch("bert")
    with torch.no_grad():
        plain = output(model, inputs)
        delta = st.attach(model, st.methods.PrefixTuning(length=3))
        randomize(delta)
        told = output(model, inputs)
    export_onnx(model, tmp_path / "model.onnx", inputs)
    torch.testing.assert_close(open_onnx(tmp_path / "model.onnx")(inputs), told, rtol=0, atol=1e-4)
    assert (told - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("wrong", "said", "always"), [
    (lambda y, b: y + 2e-4, "differs from its model by 2.0e-04", False),
    (lambda y, b: y + (b["input_ids"].shape[1] > 7), r"by 1\.0e\+00 for a batch of \(1, 10\)", False),
    (lambda y, b: y * float("nan"), "differs from its model by nan", True),
    (lambda y, b: y[:1], r"gives \(1, 3\) for a batch of \(3, 7\), its model \(3, 3\)", True),
])
def test_a_graph_that_differs_is_not_accepted(wrong, said, always):
    """With no tolerance, as for int8, a difference is measured; one that is no number, or another shape, is refused."""
    subject = Traced(tiny("bert"), batch("bert"))
    assert prove(subject, lambda given: subject(*given.values())).difference == 0

    def run(given):
        return wrong(subject(*given.values()), given)

    with pytest.raises(TrainError, match=said):
        prove(subject, run)
    if always:
        with pytest.raises(TrainError, match=said):
            prove(subject, run, None)
    else:
        assert prove(subject, run, None).difference > 1e-4


def test_shapes_stay_within_the_positions_and_pad_the_last_text():
    subject = Traced(tiny("roberta", max_position_embeddings=12), batch("roberta", tokens=8))
    shapes = shapes_to_try(subject)
    assert shapes == [(3, 8), (1, 10), (6, 10), (2, 4)]
    resaid = resized(subject.inputs, 6, 10)
    assert resaid["attention_mask"][-1].tolist() == [1] * 5 + [0] * 5
    assert resaid["input_ids"].shape == (6, 10)


@pytest.mark.parametrize(("model", "inputs", "said"), [
    ("bert", {}, "holds nothing"), ("bert", {"labels": torch.zeros(3)}, "holds nothing"),
    ("bert", {"input_ids": torch.ones(3, dtype=torch.int64)}, "input_ids is neither"),
    ("bert", {"input_ids": "text"}, "input_ids is neither"),
    ("clip", batch("clip"), "gives no logits"),
])
def test_what_cannot_be_exported(tmp_path, model, inputs, said):
    with pytest.raises(SlimtuneError, match=said):
        export_model(tiny(model), tmp_path / "x", inputs)
    assert not list(tmp_path.iterdir())


def test_other_precisions_paths_and_folders(tmp_path):
    with pytest.raises(SlimtuneError, match="bfloat16"):
        export_model(tiny("vit").bfloat16(), tmp_path / "x", batch("vit"))
    with pytest.raises(SlimtuneError, match="nncf"):
        export_model(tiny("vit"), tmp_path / "x", batch("vit"), to="openvino", int8=True)
    with pytest.raises(SlimtuneError, match=r"Name it x\.xml"):
        export_openvino(tiny("vit"), tmp_path / "x.onnx", batch("vit"))
    for opener in (open_onnx, open_openvino):
        with pytest.raises(SlimtuneError, match="cannot open"):
            opener(tmp_path / "none.xml")
    with pytest.raises(SlimtuneError, match="cannot quantise"):
        quantise_onnx(tmp_path / "none.onnx", tmp_path / "x.onnx")
    with pytest.raises(DeltaError, match="no such folder"):
        open_exported(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_module_that_cannot_be_traced(tmp_path):
    class Branches(nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": input_ids.float() * (2.0 if input_ids.sum() > 3 else 1.0)})

    with pytest.raises(SlimtuneError, match="a Branches cannot be exported"):
        export_onnx(Branches(), tmp_path / "x.onnx", {"input_ids": feed(2, 3)["input_ids"]})
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_is_named(monkeypatch):
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(extra.importlib, "import_module", _missing)
        with pytest.raises(ExtraError, match=r"slimtune\[export\]"):
            extra.need(name)


def _missing(name: str):
    raise ModuleNotFoundError(name=name)
