"""tune, eval, predict and convert from end to end, in this process and in new ones."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimtune.recipe import Recipe, digest_run, evaluate_run, predict_run, read_recipe, run
from slimtune.recipe.folder import only_one

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "slimtune", *map(str, arguments)], capture_output=True, text=True,
                          env=ENV, check=False, timeout=300, **options)


def delta_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "delta" / "delta.safetensors")


def texts(path: Path) -> list[str]:
    with path.open() as file:
        return [row["text"] for row in csv.DictReader(file)]


def test_a_run_is_tuned_scored_and_predicts_the_same_in_new_processes(cli, recipe, shelf, tmp_path):
    folder = tmp_path / "run"
    file = recipe(train={"steps": 60, "batch_size": 8, "learning_rate": 1e-2, "threads": 1, "log_every": 20})
    tuned = command("tune", file)
    assert tuned.returncode == 0, tuned.stderr
    assert {p.name for p in folder.iterdir()} >= {"recipe.yaml", "env.json", "metrics.jsonl", "result.json", "delta",
                                                  "card.md"}
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["test"]["macro_f1"] > 0.9  # guessing gives 0.5
    assert result["counts"]["adapter"] == 2 * 2 * 4 * (32 + 32)
    assert result["files"]["delta.safetensors"] == (folder / "delta" / "delta.safetensors").stat().st_size
    # plain text, no bar, where there is no terminal
    assert not re.search(r"[\x1b\r│━┃]", tuned.stdout + tuned.stderr)
    assert re.search(r"^step 20/60  loss \d\.\d{4}  \d+ s$", tuned.stdout, re.MULTILINE)
    assert str(folder) in tuned.stdout.splitlines()[-1]

    scored = command("eval", folder)
    assert scored.returncode == 0, scored.stderr
    assert f"macro_f1  {result['metrics']['test']['macro_f1']:.4f}" in scored.stdout
    assert digest_run(folder) == result["predictions_sha256"]  # bit for bit, here and in the process that trained

    there = command("predict", folder, shelf / "test.csv")
    lines = [json.loads(line) for line in there.stdout.splitlines()]
    assert lines == list(predict_run(folder, shelf / "test.csv"))
    assert lines == list(predict_run(folder, texts(shelf / "test.csv")))
    assert [set(line) for line in lines] == [{"label", "scores"}] * 24
    assert all(sum(line["scores"].values()) == pytest.approx(1) for line in lines)
    again = cli("tune", file)
    assert again.exit_code == 0
    assert "finished already" in again.stdout


def test_ctrl_c_is_exit_3_and_the_run_resumes_to_the_same_bits(cli, recipe, tmp_path):
    train = {"steps": 100, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1, "threads": 1, "save_every": 1000,
             "eval_every": 40}
    file = recipe(train=train)
    process = subprocess.Popen([sys.executable, "-m", "slimtune", "tune", file], stdout=subprocess.PIPE, env=ENV,
                               stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 240
    while not (journal.is_file() and journal.read_text().count("\n") >= 3) and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, (out, err)
    assert "Run it again" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "run" / "result.json").exists()
    assert "not finished" in cli("predict", tmp_path / "run", "--text", "x").stderr

    resumed = command("tune", file, "--quiet")
    assert (resumed.returncode, resumed.stdout, resumed.stderr) == (0, "", "")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["resumed_from"]
    assert result["steps"] == 100
    whole = run(read_recipe(file, [f"output={tmp_path / 'whole'}"]))
    assert whole.values["resumed_from"] is None
    one, other = delta_of(tmp_path / "run"), delta_of(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert result["predictions_sha256"] == whole.values["predictions_sha256"]


def test_nobodys_folder_is_overwritten(cli, recipe, tmp_path):
    file, folder = recipe(), tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    refused = cli("tune", file)
    assert refused.exit_code == 2
    assert "thesis.tex" in refused.stderr
    (folder / "thesis.tex").unlink()
    assert cli("tune", file, "--quiet").exit_code == 0
    other = cli("tune", file, "train.steps=5", "seed=9")
    assert other.exit_code == 2
    assert "train.steps was 4, is 5" in other.stderr
    assert "seed was 0, is 9" in other.stderr
    assert cli("tune", file, "train.keep=1").exit_code == 0  # changes nothing that is trained
    again = cli("tune", file, "--no-resume")
    assert again.exit_code == 2
    assert "holds this run already" in again.stderr
    assert (folder / "result.json").exists()


def test_quiet_prints_nothing_but_errors(cli, recipe):
    done = cli("tune", recipe(), "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    bad = cli("tune", recipe(), "data.train=none.csv", "--quiet")
    assert bad.exit_code == 2
    assert "none.csv" in bad.stderr


@pytest.mark.parametrize(("content", "said"), [
    ("text,label\na good film,good\nno label\n", "line 3"), ("", "no rows"), ("text,label\n", "no rows"),
    ("text,label\ngood,good\nfine,good\n", "nothing to tell apart"), ('text,label\n"open,good\n', "line 2"),
    ("review,label\na,good\nb,bad\n", "no column 'text'"), ("text,label\na,good\n,bad\n", "empty in column 'text'"),
    (b"text,label\ncaf\xe9,good\n", "utf-8")])
def test_a_bad_csv_is_exit_2_and_names_the_place(cli, recipe, tmp_path, content, said):
    bad = tmp_path / "bad.csv"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = cli("tune", recipe(), f"data.train={bad}")
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert "bad.csv" in result.stderr


def test_a_loss_that_is_not_finite_is_exit_1(cli, recipe):
    result = cli("tune", recipe(), "train.learning_rate=1e30", "train.clip=null", "train.steps=20", "train.warmup=0")
    assert result.exit_code == 1, result.output
    assert "TrainError" in result.stderr


def test_a_changed_delta_is_refused(cli, recipe, tmp_path):
    cli("tune", recipe(), "--quiet")
    file = tmp_path / "run" / "delta" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    for verb, *more in (["eval"], ["predict", "--text", "x"], ["inspect"]):
        result = cli(verb, tmp_path / "run", *more)
        assert result.exit_code == 2
        assert "DeltaError" in result.stderr


def test_eval_takes_other_data_and_nothing_else(cli, recipe, shelf, tmp_path):
    cli("tune", recipe(), "--quiet")
    other = cli("eval", tmp_path / "run", f"data.test={shelf / 'train.csv'}")
    assert "on test (64 examples)" in other.stdout, other.output
    assert evaluate_run(tmp_path / "run", [f"data.test={shelf / 'train.csv'}"])[1] == 64
    assert cli("eval", tmp_path / "run", "method.rank=2").exit_code == 2
    assert "Did you mean 'test'?" in cli("eval", tmp_path / "run", "data.tests=a").stderr


def test_predict_reads_standard_input_and_texts(cli, recipe, tmp_path):
    cli("tune", recipe(), "--quiet")
    folder = tmp_path / "run"
    given = cli("predict", folder, "-", input="a good film\nthe bad story\n")
    same = cli("predict", folder, "--text", "a good film", "--text", "the bad story")
    objects = cli("predict", folder, "-", input='{"text": "a good film"}\n{"text": "the bad story"}\n')
    (tmp_path / "in.txt").write_text("a good film\nthe bad story\n")
    assert given.stdout == same.stdout == objects.stdout == cli("predict", folder, tmp_path / "in.txt").stdout
    assert len(given.stdout.splitlines()) == 2
    for wrong in ("", '{"text": "a"}\nplain\n', '{"txt": "a"}\n', "\n"):
        assert cli("predict", folder, "-", input=wrong).exit_code == 2


def test_the_card_and_the_environment_tell_no_names(cli, recipe, tmp_path):
    cli("tune", recipe(), "--quiet")
    env = (tmp_path / "run" / "env.json").read_text()
    assert os.uname().nodename not in env
    assert str(Path.home()) not in env.replace("/root/", str(Path.home()))
    card = (tmp_path / "run" / "card.md").read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"| macro_f1 | {result['metrics']['test']['macro_f1']:.4f} | 0 to 1, more is better |" in card
    assert f"{result['counts']['stored']:,}" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    space: dict = {}
    exec(code, space)
    assert space["slimtune"].deltas(space["model"])


def test_the_resolved_recipe_runs_again(recipe, tmp_path):
    first = run(read_recipe(recipe()))
    copied = read_recipe(tmp_path / "run" / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    second = run(copied)
    assert first.values["predictions_sha256"] == second.values["predictions_sha256"]
    assert all(torch.equal(delta_of(first.folder)[k], v) for k, v in delta_of(second.folder).items())
    assert run(read_recipe(recipe(), ["seed=1", f"output={tmp_path / 'seed1'}"])).values["predictions_sha256"] != \
        first.values["predictions_sha256"]


@pytest.mark.parametrize("method", ["prefix_tuning", "full", "linear_probe", ["lora", "bitfit"]])
def test_methods_of_every_primitive_score_what_they_save(shelf, tmp_path, method):
    data = {"task": "classification", "train": str(shelf / "train.csv"), "test": str(shelf / "test.csv"),
            "max_length": 16}
    result = run(Recipe(model=str(shelf / "bert"), method=method, data=data, output=str(tmp_path / "run"),
                        train={"steps": 3, "learning_rate": 1e-3, "best": "loss", "eval_every": 1}))
    assert digest_run(tmp_path / "run") == result.values["predictions_sha256"]
    assert result.values["best_step"] in ("1", "2", "3")


def test_convert_to_peft_and_back_gives_the_same_delta(cli, recipe, tmp_path):
    cli("tune", recipe(method={"name": "lora", "rank": 4}), "--quiet")
    out = cli("convert", tmp_path / "run", tmp_path / "peft")
    assert out.exit_code == 0, out.output
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    back = cli("convert", tmp_path / "peft", tmp_path / "back")
    assert back.exit_code == 0, back.output
    one, other = delta_of(tmp_path / "run"), load_file(tmp_path / "back" / "delta.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert re.search(r"^task +classification$", cli("inspect", tmp_path / "back").stdout, re.MULTILINE)
    assert cli("convert", tmp_path / "run", tmp_path / "run").exit_code == 2


def test_a_run_killed_after_training_is_finished_without_training_again(recipe, tmp_path):
    first = run(read_recipe(recipe()))
    folder = tmp_path / "run"
    for name in ("result.json", "card.md"):
        (folder / name).unlink()
    again = run(read_recipe(recipe()))
    assert again.values["resumed_from"] == "checkpoint-4"
    assert again.values["predictions_sha256"] == first.values["predictions_sha256"]
    assert again.metrics == first.metrics
    assert (folder / "card.md").is_file()


def test_two_processes_cannot_train_the_same_run(cli, recipe, tmp_path):
    cli("tune", recipe(), "--quiet")
    (tmp_path / "run" / "result.json").unlink()
    with only_one(tmp_path / "run"):
        result = cli("tune", recipe())
    assert (result.exit_code, "another process" in result.stderr) == (2, True), result.output
    assert cli("tune", recipe(), "--quiet").exit_code == 0


def test_an_output_that_cannot_be_made_is_exit_1_without_a_traceback(cli, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli("tune", recipe(), f"output={tmp_path / 'file' / 'run'}")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    at = cli("tune", recipe(), f"output={tmp_path / 'file'}")
    assert (at.exit_code, "is a file" in at.stderr) == (2, True)


def test_check_says_when_a_method_is_larger_than_the_machine(cli, recipe):
    result = cli("check", recipe(), "method.rank=1000000000000")
    assert result.exit_code == 0
    assert "more memory than" in result.stdout
    assert cli("tune", recipe(), "method.rank=1000000000000").exit_code == 1
