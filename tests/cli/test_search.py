"""search intrinsic from end to end: a table by dimension, a proposal to copy, and going on where it stopped."""
import json
import re
import shlex

import pytest

ARGUMENTS = ("--sites", "attn.q,attn.v", "--steps", 2, "--of", "gain", "--share", 0.5, "--start", 4, "--most", 16,
             "--bisections", 1)


def trained(output: str) -> list[str]:
    return re.findall(r"^(?:the head alone|attn\.\w, [\d,]+ numbers): \d\.\d{4}  \d+ s$", output, re.MULTILINE)


def test_it_measures_proposes_and_goes_on(cli, recipe, tmp_path):
    file, folder = recipe(), tmp_path / "run-intrinsic"
    first = cli("search", "intrinsic", file, *ARGUMENTS)
    assert first.exit_code == 0, first.output
    told = json.loads((folder / "intrinsic.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "env.json", "intrinsic.json", "recipe.yaml"]
    # the head, and for each: full tuning, 4, 8 and 16 numbers, one bisection
    assert first.stdout.splitlines()[0] == "11 trainings at most, of 2 steps each, for 2 submodules; 0 are known"
    assert f"; scores on {told['validation']} validation examples" in " ".join(first.stdout.split())
    assert len(trained(first.stdout)) == len(told["trainings"]) <= 11
    assert {p["part"] for p in told["parts"]} == {"attn.q", "attn.v"}
    for part in told["parts"]:
        gain = part["full"] - told["head"]
        assert part["numbers"] == 2 * 32 * 32
        assert part["target"] == pytest.approx(told["head"] + gain / 2)
        assert part["scores"]["0"] == told["head"]
        passing = [int(d) for d, score in part["scores"].items() if score >= part["target"]]
        assert part["dimension"] in (min(passing), None)
    shown = [line.split()[0] for line in first.stdout.splitlines() if re.match(r"attn\.\w +[\d,]+ +0", line)]
    assert shown == [p["part"] for p in told["parts"]]

    again = cli("search", "intrinsic", file, *ARGUMENTS)
    assert trained(again.stdout) == []
    assert again.stdout.splitlines()[0].endswith(f"{len(told['trainings'])} are known")
    lost = {name: told["trainings"].pop(name) for name in list(told["trainings"])[1:3]}
    (folder / "intrinsic.json").write_text(json.dumps(told))
    third = cli("search", "intrinsic", file, *ARGUMENTS)
    assert len(trained(third.stdout)) == 2
    found = json.loads((folder / "intrinsic.json").read_text())["trainings"]
    assert {name: found[name] for name in lost} == lost  # the same bits

    other = cli("search", "intrinsic", file, *ARGUMENTS[:2], "--steps", 3)
    assert other.exit_code == 2
    assert "holds a search with another steps: 2." in other.stderr


def test_a_proposal_can_be_copied(cli, recipe, tmp_path, monkeypatch):
    """With scores that tell: a training of d numbers of attn.v has the score d / 16."""
    from slimtune.search.intrinsic import Trials

    needed = {"attn.v": 16, "mlp.up": 20, "mlp.down": 500, "attn.q": 2000}
    monkeypatch.setattr(Trials, "head", lambda self: 0.0)
    monkeypatch.setattr(Trials, "part", lambda self, part, d: min(1.0, d / needed[part.name]))
    file = recipe()
    result = cli("search", "intrinsic", file, "--most", 1000, "--share", 1.0, "--bisections", 9)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "run-intrinsic" / "intrinsic.json").read_text())
    assert {p["part"]: p["dimension"] for p in told["parts"]} == {**needed, "attn.q": None}
    assert [p["part"] for p in told["parts"]] == list(needed)
    advice = next(line for line in result.stdout.splitlines() if line.startswith("Adapt the lowest: slimtune "))
    words = shlex.split(advice.removeprefix("Adapt the lowest: slimtune tune "))
    assert words == [str(file), "method={name: kadaptation, sites: [attn.v, mlp.up]}"]
    checked = cli("check", *words)
    assert checked.exit_code == 0, checked.output


def test_full_tuning_of_a_run_with_other_sites_is_another_training(cli, recipe, monkeypatch):
    from slimtune.search.intrinsic import Trials

    trained = []
    monkeypatch.setattr(Trials, "head", lambda self: 0.0)
    monkeypatch.setattr(Trials, "part", lambda self, part, d: trained.append(part.sites) or 1.0)
    file = recipe()
    for sites in ("attn.q,attn.v", "attn.q,attn.k", "attn.q,attn.v"):
        result = cli("search", "intrinsic", file, "--sites", sites, "--against", "run")
        assert result.exit_code == 0, result.output
    assert [sites for sites in trained if len(sites) > 1] == [("attn.q", "attn.v"), ("attn.q", "attn.k")]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--sites", "attn.z"], "this search asked for site 'attn.z', which bert does not have."),
    (["--sites", "norm.attn"], "'norm.attn' is no weight of a linear map"),
    (["data.train=nothere.csv"], "DataError: nothere.csv: no such file."),
    (["train.best=loss"], "--of gain"),
    (["privacy={epsilon: 3, delta: 0.001}"], "privacy: a search trains many times without it"),
    (["train.best=accuracies", "data.validation_fraction=0.2"], "Did you mean 'accuracy'?"),
])
def test_bad_input_is_said_before_anything_is_trained(cli, recipe, tmp_path, arguments, said):
    result = cli("search", "intrinsic", recipe(), "--steps", 1, *arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert trained(result.stdout) == []
    assert not (tmp_path / "run-intrinsic").exists()
