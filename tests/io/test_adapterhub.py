"""AdapterHub's folders give the logits that its own library gave (adapterhub/make_fixtures.py), and go out and in."""
import json

import pytest
import torch
from adapterhub_cases import CLOSE, CONFIG, READ, base, change, copy, logits, values
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import methods
from slimtune.core.fingerprint import bits_digest
from slimtune.io.adapterhub import is_adapterhub, save_adapterhub
from slimtune.recipe.convert import convert
from slimtune.testing import tiny


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def shake(delta):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return delta


def same(a, b):
    """Two deltas hold the same tensors, bit by bit."""
    assert a.state().keys() == b.state().keys()
    assert all(torch.equal(value, b.state()[key]) for key, value in a.state().items())


@pytest.mark.parametrize(("family", "case"), READ)
def test_logits_of_the_library_in_and_out_again(family, case, tmp_path):
    folder, want = copy(family, case, tmp_path), values(family)[f"logits.{case}"]
    model = base(family)
    before = bits_digest(model)
    delta = slimtune.load(model, folder)
    assert delta.name == case
    close(logits(model, family), want)
    with delta.disabled():
        close(logits(model, family), values(family)["logits.base"])
    save_adapterhub(delta, tmp_path / "out")
    again = slimtune.load(base(family), tmp_path / "out")
    close(logits(again.model, family), want)
    same(again, delta)
    delta.detach()
    assert bits_digest(model) == before


@pytest.mark.parametrize(("case", "kinds"), [
    ("seq_bn", ["Pfeiffer"]), ("double_seq_bn", ["Houlsby"]), ("par_bn", ["ScaledParallelAdapter"]),
    ("par_attn", ["ScaledParallelAdapter"]), ("compacter", ["Compacter"]), ("compacterpp", ["StreamCompacter"]),
    ("phm_own", ["PHMAdapter"]), ("adapter_plus", ["BottleneckAdapter"]), ("by_layer", ["Houlsby", "Houlsby"]),
    ("lora", ["LoRA"]), ("ia3", ["IA3"]), ("prefix", ["PrefixTuning"]), ("union", ["LoRA", "Pfeiffer"]),
    ("mam", ["PrefixTuning", "ScaledParallelAdapter"])])
def test_they_become_the_papers_methods(case, kinds, tmp_path):
    delta = slimtune.load(base("bert"), copy("bert", case, tmp_path))
    assert [type(m).__name__ for m in delta.methods] == kinds


OWN = {
    "houlsby": [methods.Houlsby(bottleneck=3, layer_norm="out", dropout=0.1, norms="none")],
    "upper": [methods.Houlsby(bottleneck=2, blocks=(-1,), scale=0.5, norms="none")],
    "pfeiffer": [methods.Pfeiffer(bottleneck=3, layer_norm="in", activation="silu")],
    "scaled": [methods.ScaledParallelAdapter(bottleneck=2, scale=1.0, learned_scale=True)],
    "beside": [methods.ParallelAdapter(bottleneck=2, sites=("self.attn",))],
    "compacter": [methods.Compacter(bottleneck=4, division=2, rank=2, norms="none")],
    "compacterpp": [methods.CompacterPlusPlus(bottleneck=4, division=2, norms="none")],
    "lora": [methods.LoRA(rank=2, alpha=3.0, dropout=0.1, sites=("attn.q", "attn.k", "mlp.down"))],
    "ia3": [methods.IA3(sites=("attn.k", "attn.v", "mlp.up"))],
    "prefix": [methods.PrefixTuning(length=2)],
    "mam": [methods.MAM(length=2, bottleneck=3)],
    "union": [methods.PrefixTuning(length=2), methods.LoRA(rank=2), methods.Houlsby(bottleneck=2, norms="none")],
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_ours_out_and_in_bitwise(family, name, tmp_path):
    delta = shake(slimtune.attach(base(family), OWN[name], name=name))
    save_adapterhub(delta, tmp_path)
    again = slimtune.load(base(family), tmp_path)
    close(logits(again.model, family), logits(delta.model, family))
    same(again, delta)
    assert [(type(m), m.model_dump(exclude={"sites", "init", "blocks", "head"})) for m in again.methods] == [
        (type(m), m.model_dump(exclude={"sites", "init", "blocks", "head"})) for m in delta.methods]


def test_a_network_that_makes_a_prefix_is_dropped_on_the_way_out(tmp_path):
    delta = shake(slimtune.attach(base("gpt2"), methods.PrefixTuning(length=2, hidden=4)))
    save_adapterhub(delta, tmp_path)
    again = slimtune.load(base("gpt2"), tmp_path)
    assert again.methods[0].hidden is None
    close(logits(again.model, "gpt2"), logits(delta.model, "gpt2"))


def test_any_bottleneck_has_a_reduction_that_gives_it_back(tmp_path):
    for width in (3, 5, 7, 8, 11):
        delta = slimtune.attach(base("bert"), methods.Pfeiffer(bottleneck=width))
        save_adapterhub(delta, tmp_path)
        assert slimtune.load(base("bert"), tmp_path).methods[0].bottleneck == width
        factor = json.loads((tmp_path / CONFIG).read_text())["config"]["reduction_factor"]
        assert int(8 // factor) == width  # the library's own rule


def test_lora_of_versions_before_1_1_ran_at_scale_one(tmp_path):
    """The oracle: B A added to the weights by hand, unscaled, whatever alpha says."""
    folder = copy("bert", "lora", tmp_path)
    change(folder, top={"version": "adapters.1.0.1"})
    model = base("bert")
    for key, b in load_file(folder / "adapter.safetensors").items():
        if key.endswith("lora_B"):
            a = load_file(folder / "adapter.safetensors")[key.replace("lora_B", "lora_A")]
            model.get_submodule(key.partition(".loras.")[0]).weight.data += b @ a
    delta = slimtune.load(base("bert"), folder)
    assert (delta.methods[0].rank, delta.methods[0].alpha) == (2, 2.0)
    close(logits(delta.model, "bert"), logits(model, "bert"))
    change(folder, top={"version": "adapters.1.1.0"})
    assert slimtune.load(base("bert"), folder).methods[0].alpha == 5.0


def test_files_of_adapter_transformers(tmp_path):
    """No version, old keys, the old name of an activation, and an invertible adapter that a task adapter has not."""
    folder = copy("bert", "seq_bn", tmp_path)
    tensors = load_file(folder / "adapter.safetensors")
    old = {k.replace("output.adapters.", "output.layer_text_task_adapters."): v for k, v in tensors.items()}
    save_file(old, folder / "adapter.safetensors")
    inverse = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    change(folder, top={"version": ..., "type": "text_task"}, non_linearity="gelu", invertible_adapter=inverse,
           attention_type="sentence-lvl-dynamic", new_attention_norm=False, scaling=...)
    delta = slimtune.load(base("bert"), folder)
    assert delta.methods[0].activation == "gelu_new"
    assert all(torch.equal(delta.state()[f"encoder.{i}.norm.mlp.pfeiffer.down"], tensors[
        f"bert.encoder.layer.{i}.output.adapters.seq_bn.adapter_down.0.weight"]) for i in range(2))


def test_a_base_model_and_names_without_its_prefix(tmp_path):
    """A file saved from BertModel loads on a model with a head, as it does in the library."""
    folder = copy("bert", "double_seq_bn", tmp_path)
    for name in ("head_config.json", "model_head.safetensors"):
        (folder / name).unlink()
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k.removeprefix("bert."): v for k, v in tensors.items()}, folder / "adapter.safetensors")
    model = base("bert")
    delta = slimtune.load(model, folder)
    assert delta.count().head == 0
    close(logits(model, "bert"), values("bert")["logits.double_seq_bn"])


def test_heads_of_the_library(tmp_path):
    """BERT's head of two layers has a pooler of its own, which is the delta's here and goes out as it came."""
    folder = copy("bert", "head", tmp_path)
    delta = slimtune.load(base("bert"), folder)
    assert delta.methods[0].pooler
    save_adapterhub(delta, tmp_path / "out")
    theirs = torch.load(folder / "pytorch_model_head.bin", weights_only=True)
    ours = load_file(tmp_path / "out/model_head.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    told = json.loads((tmp_path / "out/head_config.json").read_text())
    assert (told["model_class"], told["config"]["num_labels"]) == ("BertAdapterModel", 3)


def test_a_head_that_the_model_has_no_place_for_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match="its head is left out: BertModel has no place"):
        delta = slimtune.load(base("bert", "BertModel"), copy("bert", "double_seq_bn", tmp_path))
    assert delta.count().head == 0


def test_beside_another_delta_and_into_our_own_folder(tmp_path):
    folder = copy("bert", "mam", tmp_path)
    model = base("bert")
    first = shake(slimtune.attach(model, methods.LoRA(rank=2, norms="all"), name="first"))
    mine = logits(model, "bert")
    slimtune.load(model, folder, name="second").save(tmp_path / "ours")
    first.activate()
    assert torch.equal(logits(model, "bert"), mine)
    again = slimtune.load(base("bert"), tmp_path / "ours")
    assert again.name == "second"
    assert again.info["adapterhub"]["name"] == "mam"
    close(logits(again.model, "bert"), values("bert")["logits.mam"])


def test_which_library_a_folder_is_of(tmp_path):
    from slimtune.io.peft import save_peft

    save_peft(slimtune.attach(tiny("bert"), methods.LoRA(rank=2)), tmp_path / "peft")
    hub = copy("bert", "lora", tmp_path)
    assert (is_adapterhub(hub), is_adapterhub(tmp_path / "peft"), is_adapterhub(tmp_path)) == (True, False, False)
    (hub / "adapter.safetensors").unlink()
    assert is_adapterhub(hub)
    assert slimtune.load(tiny("bert"), tmp_path / "peft").info["peft"]["peft_type"] == "LORA"


def test_convert_from_and_to_adapterhub(tmp_path):
    folder, model = copy("bert", "lora", tmp_path), str(copy("bert", "base", tmp_path))
    done = convert(folder, tmp_path / "ours", model=model)
    assert (done.format, done.tensors) == ("slimtune", 10)
    assert convert(tmp_path / "ours", tmp_path / "hub", "adapterhub").format == "adapterhub"
    assert convert(tmp_path / "hub", tmp_path / "peft", "peft").format == "peft"
    for name in ("hub", "peft"):
        close(logits(slimtune.load(base("bert"), tmp_path / name).model, "bert"), values("bert")["logits.lora"])
    head = copy("roberta", "head", tmp_path)
    roberta = tmp_path / "roberta"
    roberta.mkdir()
    assert convert(head, tmp_path / "flexible", model=str(copy("roberta", "base", roberta))).format == "slimtune"
