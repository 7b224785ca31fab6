"""Recipes that prune while they train: from the file to the masks, resumed, and what is wrong in one."""
import json

import pytest
import torch

from slimtune.recipe.use import load_run

TRAIN = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "threads": 1, "save_every": 4, "log_every": 4}
SOFT = {"on": "base", "criterion": {"name": "movement", "step": "adam", "rate": 0.1, "strength": 30.0},
        "allocation": {"tau": 0.4}, "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6, "every": 1}}


def masks(folder):
    return load_run(folder).model._modules["slimtune"].deltas["own"].masks


def tuned(cli, file, *overrides):
    done = cli("tune", file, *overrides)
    assert done.exit_code == 0, done.output


def test_soft_movement(cli, recipe, tmp_path):
    file = recipe(method={"name": "full"}, prune=SOFT, train=TRAIN)
    assert cli("check", file).exit_code == 0
    tuned(cli, file)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = masks(tmp_path / "run")
    assert result["sparsity"]["kept"] == sum(int(m.sum()) for m in found.values())
    assert 0.05 < result["sparsity"]["sparsity"] < 1
    assert len({float(m.float().mean()) for m in found.values()}) > 2  # each matrix its own
    tuned(cli, file, f"output={tmp_path / 'again'}")
    assert all(torch.equal(masks(tmp_path / "again")[n], m) for n, m in found.items())


def test_two_of_four_while_it_trains(cli, recipe, tmp_path):
    file = recipe(method={"name": "full"}, train=TRAIN,
                  prune={"on": "base", "granularity": "2:4", "schedule": {"name": "sr_ste", "strength": 0.01}})
    tuned(cli, file)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sparsity"]["sparsity"] == 0.5
    for mask in masks(tmp_path / "run").values():
        assert set(mask.view(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.parametrize(("prune", "said"), [
    ({"schedule": "sr_ste"}, "give a granularity n:m such as 2:4"),
    ({"granularity": "2:4", "schedule": {"name": "sr_ste", "strenght": 1}}, "Did you mean 'strength'?"),
    ({"granularity": "2:4", "schedule": "sr_se"}, "'sr_ste'"),
    ({"granularity": "2:4", "schedule": "sr_ste", "sparsity": 0.5}, "2:4 decides its own sparsity"),
    ({"granularity": "2:4", "schedule": "cubic"}, "pruned in one shot, or by sr_ste")])
def test_what_is_wrong_with_sr_ste_is_said(cli, recipe, tmp_path, prune, said):
    result = cli("tune", recipe(method={"name": "full"}, prune={"on": "base", **prune}, train=TRAIN))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"allocation": {"tau": 0.1, "lest": 0.1}}, ["prune.allocation.lest", "It takes: tau least compat", "'least'"]),
    ({"allocation": {"tau": 2}}, ["prune.allocation.tau", "must be below 1.0 (got 2)"]),
    ({"allocation": {"unit": "macs", "tokns": 8}}, ["prune.allocation.tokns", "'tokens'"]),
    ({"schedule": {"name": "cubic", "begn": 1}}, ["prune.schedule.begn", "'begin'"]),
    ({"schedule": "one_shot"}, ["Movement learns its scores"]),
    ({"sparsity": 0.5}, ["a threshold decides its own sparsity"]),
    ({"criterion": "magnitude"}, ["Magnitude are no such S"])])
def test_what_is_wrong_is_said(cli, recipe, tmp_path, change, said):
    result = cli("tune", recipe(method={"name": "full"}, prune={**SOFT, **change}, train=TRAIN))
    assert result.exit_code == 2
    assert all(words in " ".join(result.stderr.split()) for words in said), result.stderr
    assert not (tmp_path / "run").exists()


def test_neurons_by_the_dozen(cli, recipe, tmp_path):
    prune = {"sparsity": 0.5, "on": "gates", "criterion": "taylor", "allocation": {"multiple": 12}, "examples": 16}
    file = recipe(method=["full", "gates"], prune=prune, train=TRAIN | {"steps": 2})
    done = cli("prune", file)
    assert done.exit_code == 0, done.output
    neurons = [int(m.sum()) for n, m in masks(tmp_path / "run").items() if "mlp.act" in n]
    assert sum(neurons) > 0
    assert all(number % 12 == 0 for number in neurons)
    told = json.loads((tmp_path / "run" / "shrunk.json").read_text())
    assert sorted(told["neurons"].values()) == sorted(neurons)


@pytest.mark.parametrize("verb", ["check", "tune"])
@pytest.mark.parametrize(("change", "said"), [
    ({"allocation": {"multiple": 999}}, "multiple of 999 neurons a layer"),
    ({"allocation": {"multiple": 0}}, "prune.allocation.multiple"),
    ({"allocation": {"unit": "latency", "each": {"mlp.act": 1.0}}}, "'attn.heads': ..."),
    ({"allocation": {"unit": "latency", "each": {"mlp.act": 0, "attn.heads": 1.0}}}, "prune.allocation.each"),
    ({"by": "weights", "criterion": "movement", "schedule": "cubic"}, "by='weights' would ask it for scores")])
def test_what_gates_cannot_is_said_before_anything_is_written(cli, recipe, tmp_path, verb, change, said):
    prune = {"sparsity": 0.5, "on": "gates", "criterion": "taylor", **change}
    result = cli(verb, recipe(method=["full", "gates"], prune=prune, train=TRAIN))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split()), result.output
    assert not (tmp_path / "run").exists()
