"""`slimtune prune`: from a recipe to a smaller model that is saved and loaded like any other; and runs that teach."""
import csv
import json

import pytest
import torch

import slimtune as st
from slimtune.recipe import smaller
from slimtune.recipe.use import load_run

TRAIN = {"steps": 60, "batch_size": 8, "learning_rate": 1e-2, "threads": 1, "log_every": 20}
GATES = {"sparsity": 0.5, "on": "gates", "criterion": "taylor", "allocation": {"unit": "macs", "tokens": 16},
         "examples": 32}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_heads_and_neurons_are_pruned_trained_and_sliced_out(cli, recipe, tmp_path):
    file = recipe(method=[{"name": "full"}, {"name": "gates"}], prune=GATES, train=TRAIN)
    checked = cli("check", file)
    assert checked.exit_code == 0, checked.output
    done = cli("prune", file)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "shrunk.json").read_text())
    assert told["difference"] < 1e-5
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["test"]["macro_f1"] > 0.9  # guessing gives 0.5
    assert result["sparsity"]["denominator"] == "gates"
    small, ids = st.load_model(tmp_path / "run" / "model"), torch.randint(5, 20, (3, 9))
    assert sum(p.numel() for p in small.parameters()) == told["parameters"][1] < told["parameters"][0]
    torch.testing.assert_close(logits(small, ids), logits(load_run(tmp_path / "run").model, ids), atol=1e-5, rtol=1e-5)
    dense = st.load_model(result["model"], "classification")
    assert st.count_macs(small, tokens=16).total <= 0.5 * st.count_macs(dense, tokens=16).total
    again = cli("prune", file)
    assert again.exit_code == 0, again.output
    assert "finished already" in again.output
    assert json.loads((tmp_path / "run" / "shrunk.json").read_text()) == told


def test_the_width_of_the_stream_is_pruned_and_sliced(cli, recipe, tmp_path):
    prune = {"sparsity": 0.25, "on": "hidden", "criterion": "taylor", "examples": 32}
    method = ["full", {"name": "gates", "hidden": True}]
    file = recipe(method=method, prune=prune, train=TRAIN | {"steps": 20})
    done = cli("prune", file)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "shrunk.json").read_text())
    assert told["hidden"] == {"encoder": 24}
    assert told["difference"] < 1e-5
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sparsity"]["denominator"] == "hidden"
    small, ids = st.load_model(tmp_path / "run" / "model"), torch.randint(5, 20, (3, 9))
    assert small.bert.embeddings.word_embeddings.embedding_dim == 24
    torch.testing.assert_close(logits(small, ids), logits(load_run(tmp_path / "run").model, ids), atol=1e-5, rtol=1e-5)
    refused = cli("prune", recipe(method=["full", "gates"], prune=prune, output=str(tmp_path / "other")))
    assert refused.exit_code == 2
    assert "Gates(hidden=True)" in refused.output


def test_what_was_stopped_goes_on_and_no_folder_of_another_is_touched(cli, recipe, tmp_path, monkeypatch):
    file = recipe(method=[{"name": "full"}, {"name": "gates"}], prune=GATES, train=TRAIN | {"steps": 2})
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(st.Delta, "save", _interrupted)
        assert cli("prune", file).exit_code == 3
    half = cli("export", run)
    assert (half.exit_code, "slimtune prune" in half.stderr) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(smaller, "save_model", _interrupted)
        assert cli("prune", file).exit_code == 3
    assert json.loads((run / "result.json").read_text())["resumed_from"] == "checkpoint-2"
    (run / "model").mkdir()
    (run / "model" / "mine").write_text("mine")
    other = cli("prune", file)
    assert (other.exit_code, "move that one away" in other.stderr) == (2, True)
    assert [p.name for p in (run / "model").iterdir()] == ["mine"]
    assert not (run / "shrunk.json").exists()
    (run / "model" / "mine").unlink()
    done = cli("prune", file, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert st.load_model(run / "model").num_labels == 2


def _interrupted(*args):
    raise KeyboardInterrupt


def test_a_layer_may_lose_all_its_heads(cli, recipe, tmp_path):
    """No gradient reaches its projections any more, and that is no mistake."""
    gates = {"sparsity": 0.5, "on": "gates", "granularity": "whole", "allocation": "global"}
    done = cli("prune", recipe(method=[{"name": "full"}, {"name": "gates"}], prune=gates, train=TRAIN | {"steps": 4}))
    assert done.exit_code == 0, done.output
    assert "gates all start at 1" in done.output
    told = json.loads((tmp_path / "run" / "shrunk.json").read_text())
    assert 0 in (*told["heads"].values(), *told["neurons"].values())


def test_a_block_of_pre_norms_may_be_emptied(cli, recipe, shelf, tmp_path):
    """Of the norms that only empty sub-layers read, no gradient is expected either."""
    gates = {"sparsity": 0.5, "on": "gates", "allocation": "global"}
    done = cli("prune", recipe(model=str(shelf / "gpt2"), method=[{"name": "full"}, {"name": "gates"}], prune=gates))
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "shrunk.json").read_text())
    assert (told["heads"]["decoder.0.attn.heads"], told["neurons"]["decoder.0.mlp.act"]) == (0, 0)


def test_a_run_teaches(cli, recipe, shelf, tmp_path):
    assert cli("tune", recipe(train=TRAIN, output=str(tmp_path / "dense"))).exit_code == 0
    with (shelf / "train.csv").open() as old, (tmp_path / "wrong.csv").open("w", newline="") as new:
        swapped = {"good": "bad", "bad": "good"}
        csv.writer(new).writerows([text, swapped.get(label, label)] for text, label in csv.reader(old))
    data = {"task": "classification", "train": str(tmp_path / "wrong.csv"), "test": str(shelf / "test.csv"),
            "max_length": 16}
    scores = {}
    for weight in (0.0, 1.0):
        file = recipe(train=TRAIN, data=data, distill={"teacher": str(tmp_path / "dense"), "weight": weight},
                      method={"name": "full"}, output=str(tmp_path / f"run{weight}"))
        done = cli("tune", file)
        assert done.exit_code == 0, done.output
        scores[weight] = json.loads((tmp_path / f"run{weight}" / "result.json").read_text())["metrics"]["test"]
    assert scores[0.0]["accuracy"] < 0.2          # it learns the wrong labels
    assert scores[1.0]["accuracy"] > 0.8          # and the teacher knows better


def test_a_delta_is_pruned_and_no_model_is_made_smaller(cli, recipe, tmp_path):
    done = cli("prune", recipe(prune={"sparsity": 0.4, "criterion": "magnitude"}, train=TRAIN | {"steps": 4}))
    assert done.exit_code == 0, done.output
    assert "These are zeros, not a smaller model" in done.output
    assert not (tmp_path / "run" / "model").exists()
    state = load_run(tmp_path / "run").model._modules["slimtune"].deltas["own"]
    assert sum(int((~m).sum()) for m in state.masks.values()) == int(0.4 * sum(m.numel() for m in state.masks.values()))


@pytest.mark.parametrize(("nodes", "said"), [
    ({}, "has no prune"), ({"prune": {"sparsity": 1.5}}, "prune.sparsity"),
    ({"prune": {"sparsity": 0.5, "criterion": "snipp"}}, "Did you mean 'snip'?"),
    ({"prune": {"sparsity": 0.5, "on": "gates"}}, "Gates"),
    ({"method": [{"name": "houlsby"}, {"name": "gates"}], "prune": GATES}, "cannot be folded in"),
    ({"method": [{"name": "prefix_tuning"}, {"name": "gates"}], "prune": GATES}, "PrefixTuning cannot be merged"),
    ({"prune": {"sparsity": 0.5}, "distill": {"teacher": "no-such"}}, "no-such"),
    ({"prune": {"sparsity": 0.5}, "distill": {"teacher": "x", "wieght": 1}}, "weight"),
])
def test_bad_recipes_are_said(cli, recipe, tmp_path, nodes, said):
    result = cli("prune", recipe(**nodes))
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()
