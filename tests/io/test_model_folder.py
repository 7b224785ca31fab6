"""A model's folder: bitwise the same in another process, refused when it is damaged, never a wrong model in silence."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimtune as st
from slimtune.core.manifest import digest_file, render, seal
from slimtune.sparsity.lowrank import low_rank
from slimtune.testing import batch, output, tiny
from slimtune.testing.tiny import NAMES

ELSEWHERE = ("bert", "gpt2", "llama", "t5", "bart", "swin", "clip")
MANIFEST, TENSORS = "slimtune-model.json", "slimtune.safetensors"
READ = """
import sys, torch, slimtune as st
from safetensors.torch import load_file, save_file
from slimtune.testing import batch, output
torch.set_num_threads(1)
for family in sys.argv[2:]:
    model = st.load_model(sys.argv[1] + "/" + family)
    with torch.no_grad():
        save_file({"out": output(model, batch(family)).contiguous()}, sys.argv[1] + "/" + family + ".out")
"""


def shrunk(family: str):
    """A first block of nothing, a second one of less, a map of low rank."""
    model = tiny(family)
    sites = [s for s in st.dissect(model).sites if s.role in ("attn.heads", "mlp.act")]
    keep = {s.name: [] if s.block == 0 else [1] if s.role == "attn.heads" else range(9) for s in sites
            if not (family in ("t5", "mpnet") and s.role == "attn.heads")}
    if family in ("t5", "mpnet"):  # whose blocks need the same heads
        keep |= {s.name: [1, 2] for s in sites if s.role == "attn.heads"}
    st.shrink(model, keep=keep)
    low_rank(model, {"mlp.up": 2})
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in NAMES if name not in ELSEWHERE])
def test_bitwise(family: str, tmp_path: Path):
    model = shrunk(family)
    st.save_model(model, tmp_path / "m")
    assert torch.equal(output(st.load_model(tmp_path / "m"), batch(family)), output(model, batch(family)))


@torch.no_grad()
def test_bitwise_in_another_process(tmp_path: Path):
    from safetensors.torch import load_file
    told, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for family in ELSEWHERE:
        model = shrunk(family)
        st.save_model(model, tmp_path / family)
        told[family] = output(model, batch(family))
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", READ, str(tmp_path), *ELSEWHERE], check=True)
    for family, out in told.items():
        assert torch.equal(load_file(tmp_path / f"{family}.out")["out"], out), family


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    st.save_model(shrunk("bert"), tmp_path / "small")
    return tmp_path / "small"


def test_what_is_read_again(folder: Path):
    model = st.load_model(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    st.save_model(model, folder.parent / "again")
    told, again = (json.loads((f / MANIFEST).read_text()) for f in (folder, folder.parent / "again"))
    assert told["files"][TENSORS] == again["files"][TENSORS]
    assert told["structure"] == again["structure"]
    assert told["structure"]["shapes"]
    assert told["structure"]["modules"]
    meta = st.load_model(folder, meta=True)
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert next(meta.parameters()).is_meta


def test_another_task_has_the_backbone_and_a_new_head(folder: Path):
    small = st.load_model(folder)
    five, again = (st.load_model(folder, "classification", num_labels=5, seed=3) for _ in range(2))
    words = st.load_model(folder, "token_classification", num_labels=4)
    for model in (five, words):
        kept = {n: p for n, p in model.named_parameters() if n.startswith("bert.")}
        assert all(torch.equal(p, small.get_parameter(n)) for n, p in kept.items())
        assert len(kept) > 20
    assert five.classifier.weight.shape == (5, 32)
    assert torch.equal(five.classifier.weight, again.classifier.weight)
    assert torch.equal(st.load_model(folder, "classification").classifier.weight, small.classifier.weight)


def test_a_bare_backbone_gets_a_head(tmp_path: Path):
    bare = tiny("bert").bert
    st.shrink(bare, keep={"encoder.0.attn.heads": [0]})
    st.save_model(bare, tmp_path / "bare")
    model = st.load_model(tmp_path / "bare", "classification", num_labels=2)
    ids = batch("bert")["input_ids"]
    assert torch.equal(model.bert(ids).last_hidden_state, bare(ids).last_hidden_state)


def test_dtype_is_kept_on_request(tmp_path: Path):
    model = tiny("llama").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    st.save_model(model, tmp_path / "m")
    assert st.load_model(tmp_path / "m").dtype == torch.float32
    same = st.load_model(tmp_path / "m", dtype="auto")
    assert all(torch.equal(p, same.get_parameter(n)) and p.dtype == torch.bfloat16 for n, p in model.named_parameters())


def test_transformers_says_that_there_are_no_weights(folder: Path):
    from transformers import AutoModel, AutoModelForSequenceClassification
    for cls in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(OSError, match="no file named"):
            cls.from_pretrained(folder, local_files_only=True)


def test_a_folder_of_transformers_is_read_as_what_it_says(tmp_path: Path):
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    again = st.load_model(tmp_path)
    assert torch.equal(output(again, batch("bert")), output(model, batch("bert")))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["os.system"]}))
    with pytest.raises(st.SlimtuneError, match="names no model class of transformers"):
        st.load_model(tmp_path)


def forge(folder: Path, change) -> None:
    """A manifest that was changed and sealed again."""
    body = json.loads((folder / MANIFEST).read_text())
    change(body)
    (folder / MANIFEST).write_bytes(render(seal(body)))


def first(table: dict) -> str:
    return next(iter(table))


def without_a_tensor(folder: Path) -> None:
    """A file of one tensor less, and a manifest that agrees with it in everything."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / TENSORS)
    name = first(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / TENSORS, {"format": "pt"})
    forge(folder, lambda b: (b["tensors"].pop(name), b["files"].update({TENSORS: digest_file(folder / TENSORS)})))


@pytest.mark.parametrize(("harm", "message"), [
    (lambda f: (f / TENSORS).unlink(), "is missing"),
    (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "bytes, its manifest says"),
    (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1] + b"\7"), "SHA-256 differs"),
    (lambda f: (f / "config.json").write_text("{}"), "config"),
    (lambda f: (f / "extra.bin").write_bytes(b"x"), "which its manifest does not name"),
    (lambda f: (f / MANIFEST).write_text("{"), "not valid JSON"),
    (lambda f: forge(f, lambda b: b.update(format="other")), "has format 'other'"),
    (lambda f: forge(f, lambda b: b.update(format_version=2)), "newer slimtune"),
    (lambda f: forge(f, lambda b: b.pop("structure")), "does not say what the model is"),
    (lambda f: forge(f, lambda b: b["structure"].update(code="x")), "structure is malformed"),
    (lambda f: forge(f, lambda b: b["structure"]["modules"].update({"bert.pooler": {"kind": "exec"}})), "malformed"),
    (lambda f: forge(f, lambda b: b["structure"]["modules"].update({"bert.nothing": {"kind": "identity"}})),
     "has not"),
    (lambda f: forge(f, lambda b: b["structure"]["attributes"].update({"bert": {"forward": "x"}})), "bert.forward"),
    (lambda f: forge(f, lambda b: b["structure"]["attributes"].update({"bert": {"__class__": "x"}})), "__class__"),
    (lambda f: forge(f, lambda b: b["structure"]["shapes"].pop("bert.encoder.layer.1.output.dense.weight")),
     "do not have the shapes"),
    (without_a_tensor, "holds no bert"),
    (lambda f: forge(f, lambda b: b["tensors"].pop(first(b["tensors"]))), "does not hold the tensors")])
def test_a_damaged_folder_is_refused(folder: Path, harm, message: str):
    harm(folder)
    with pytest.raises(st.SlimtuneError, match=message):
        st.load_model(folder)


def test_what_cannot_be_saved(tmp_path: Path):
    model = tiny("bert")
    delta = st.attach(model, st.methods.LoRA(rank=2))
    with pytest.raises(st.SlimtuneError, match="has deltas attached: default"):
        st.save_model(model, tmp_path / "m")
    delta.detach()
    with pytest.raises(st.SlimtuneError, match="no model of transformers"):
        st.save_model(torch.nn.Linear(2, 2), tmp_path / "m")
    model.bert.pooler.activation = torch.nn.Tanhshrink()
    with pytest.raises(st.SlimtuneError, match=r"bert\.pooler\.activation is a Tanhshrink"):
        st.save_model(model, tmp_path / "m")
    model.bert.pooler = None
    with pytest.raises(st.SlimtuneError, match=r"has no bert\.pooler"):
        st.save_model(model, tmp_path / "m")
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(st.SlimtuneError, match="NaN"):
        st.save_model(model, tmp_path / "m")
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(st.SlimtuneError):
            st.save_model(tiny("bert"), tmp_path / "n", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n"]
