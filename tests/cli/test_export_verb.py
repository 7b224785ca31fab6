"""`slimtune export`: from a run, and from a shrunk model's folder, to a folder that another program can use."""
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import slimtune as st
from slimtune.compress import open_exported
from slimtune.io.models import load_tokenizer
from slimtune.recipe.use import load_run

pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime",
                                                                         "openvino")), reason="needs slimtune[export]")
TEXTS = ["the film was good", "a poor story and an awful actor", "fine"]


def test_a_run_in_onnx(cli, recipe, tmp_path):
    assert cli("tune", recipe(), "--quiet").exit_code == 0
    result = cli("export", tmp_path / "run")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run-onnx"
    assert result.stdout.startswith(f"{folder}: onnx, ")
    told = json.loads((folder / "slimtune-export.json").read_text())
    assert told["about"] == {"task": "classification", "delta": "merged", "max_length": 16}
    assert told["labels"] == ["bad", "good"]
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    opened, tuned = open_exported(folder), load_run(tmp_path / "run")
    assert opened.labels == tuned.labels
    batch = load_tokenizer(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch), tuned.model(**batch).logits, rtol=0, atol=1e-4)
        plain = st.load_model(tuned.recipe.model, "classification", label_names=tuned.labels)(**batch).logits
    assert (opened(**batch) - plain).abs().max() > 1e-3
    again = cli("export", tmp_path / "run", "--output", tmp_path / "run")
    assert again.exit_code == 2
    assert "not replaced" in again.stderr


def test_a_shrunk_model_in_int8(cli, shelf, tmp_path):
    model = st.load_model(shelf / "bert", "classification", num_labels=2)
    st.shrink(model, keep={"encoder.0.attn.heads": [1], "encoder.1.mlp.act": range(20)})
    st.save_model(model, tmp_path / "small", load_tokenizer(shelf / "bert"))
    result = cli("export", tmp_path / "small", "--int8", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    opened = open_exported(tmp_path / "out")
    batch = load_tokenizer(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        told = model(**batch).logits
    assert 0 < (opened(**batch) - told).abs().max() < 0.1 * told.abs().max()
    assert opened.manifest["int8"] is True


def test_what_cannot_be_exported_is_bad_input(cli, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("model: x\n")
    Path("run/delta").mkdir()
    for arguments, said in ((["empty"], "neither a run nor a model"), (["run"], "is not finished"),
                            (["run/delta"], f"The run is {tmp_path / 'run'}"), (["run/recipe.yaml"], "a file"),
                            ([shelf / "bert", "--output", "run"], "not replaced"),
                            ([shelf / "gpt2"], "no head that classifies"),
                            ([shelf / "bert", "--to", "openvino", "--int8"], "nncf")):
        result = cli("export", *arguments)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for loaded in [name for name in sys.modules if name.startswith("onnxruntime.")]:
        monkeypatch.delitem(sys.modules, loaded)
    result = cli("export", shelf / "bert")
    assert (result.exit_code, "pip install 'slimtune[export]'" in result.stderr) == (2, True), result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run"]
