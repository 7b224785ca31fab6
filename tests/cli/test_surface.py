"""The frozen surface: verbs, arguments, options and exit codes that other programs hold on to."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from slimtune.cli import console
from slimtune.cli.main import app
from slimtune.methods import names

SURFACE = {
    "tune": ["recipe", "overrides", "--resume", "--quiet"],
    "eval": ["run", "overrides"],
    "predict": ["run", "source", "--text", "--pair", "--image"],
    "methods": ["--model", "--budget"],
    "inspect": ["model"],
    "check": ["recipe", "overrides", "--schema"],
    "convert": ["src", "dst", "--to", "--model"],
    "prune": ["recipe", "overrides", "--resume", "--quiet"],
    "export": ["source", "--to", "--int8", "--output"],
    "search": [],
}
SEARCHES = {"intrinsic": ["recipe", "overrides", "--sites", "--per-block", "--share", "--of", "--against", "--steps",
                          "--learning-rate", "--start", "--most", "--bisections"]}


def test_the_surface_is_frozen():
    group = get_command(app)
    found = {name: [next(o for o in p.opts) for p in command.params if p.name != "help"]
             for name, command in group.commands.items()}  # type: ignore[attr-defined]
    assert found == SURFACE
    searches = group.commands["search"].commands  # type: ignore[attr-defined]
    assert {name: [next(o for o in p.opts) for p in command.params] for name, command in searches.items()} == SEARCHES
    assert [p.opts for p in group.params if p.name != "help"] == [["--version"]]
    resume = next(p for p in group.commands["tune"].params if p.name == "resume")  # type: ignore[attr-defined]
    assert resume.secondary_opts == ["--no-resume"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["tuen"], "Did you mean 'tune'?"), (["tune", "--quite", "x"], "--quiet"), (["tune"], "RECIPE"),
    (["predict"], "RUN"),
    (["convert", "a", "b", "--to", "petf"], "peft"), (["methods", "x"], "x"), (["check"], "check needs a recipe"),
    (["tune", "no-such.yaml"], "RecipeError: no-such.yaml: no such file."),
    (["eval", "no-such-run"], "RecipeError: no-such-run: no such folder."),
    (["inspect", "minlim"], "Did you mean 'minilm'?"), (["methods", "--model", "minlim"], "Did you mean 'minilm'?"),
    *[(["methods", "--model", "minilm", "--budget", size], "such as 300_000, 50k or 1.5M.")
      for size in ("abc", "0%", "-1", "")],
    (["methods", "--budget", "50k"], "--budget needs a model to count on."),
    (["methods", "--model", "minlim", "--budget", "50k"], "Did you mean 'minilm'?"),
    (["search", "intrinsic", "no-such.yaml"], "RecipeError: no-such.yaml: no such file."),
    (["search", "intrinsic", "x.yaml", "--start", "9", "--most", "8"], "--start 9 is above --most 8."),
    (["search", "intrinsic", "x.yaml", "--of", "gains"], "gain"), (["search", "intrinsik"], "intrinsic"),
    (["convert", "no-such", "x"], "DeltaError: no-such: no delta"),
    (["export", "minlim"], "Did you mean 'minilm'?"), (["export", "minilm"], "BertModel has no head that classifies"),
    (["export", "run", "--to", "onxx"], "openvino"), (["export"], "SOURCE"),
    (["predict", "run"], "predict needs texts"), (["predict", "run", "f.csv", "--text", "x"], "predict needs texts"),
    (["predict", "run", "--text", "a", "--pair", "b", "--pair", "c"], "2 --pair for 1 --text"),
    (["predict", "run", "--text", "x"], "RecipeError: run: no such folder."),
])
def test_bad_input_is_exit_code_2_with_advice(cli, arguments, said):
    result = cli(*arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert result.stdout == ""


def test_kinds_of_failure_have_their_exit_codes(monkeypatch, capsys):
    from slimtune.errors import DataError, TrainError
    from slimtune.train import Interrupted

    for error, code, said in ((DataError("a.csv: bad."), 2, "DataError: a.csv: bad."), (TrainError("NaN."), 1, "NaN."),
                              (Interrupted("told to stop."), 3, "told"), (KeyboardInterrupt(), 3, "Interrupted."),
                              (OSError(28, "No space left on device"), 1, "No space"), (MemoryError(), 1, "no memory"),
                              (ZeroDivisionError("x\ny"), 1, "SLIMTUNE_DEBUG=1")):
        @console.verb
        def fails(error=error):
            raise error

        with pytest.raises(console.typer.Exit) as caught:
            fails()
        message = capsys.readouterr().err
        assert caught.value.exit_code == code
        assert said in message
        assert "Traceback" not in message
        monkeypatch.setenv("SLIMTUNE_DEBUG", "1")
        with pytest.raises(console.typer.Exit):
            fails()
        assert "Traceback" in capsys.readouterr().err
        monkeypatch.delenv("SLIMTUNE_DEBUG")


def test_help_and_version_are_light():
    """No transformers for what needs none; `python -m slimtune` is the same program."""
    script = ("import sys; from slimtune.cli.main import app; app(['--help'], standalone_mode=False)\n"
              "heavy = {'transformers', 'sklearn', 'datasets', 'scipy'}\n"
              "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in SURFACE:
        assert f"  {verb}" in done.stdout


def test_methods_lists_every_method_with_its_source(cli):
    lines = cli("methods").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names()
    cells = re.split(r" {2,}", next(line for line in lines if line.startswith("lora ")))
    assert cells[1:] == ["Hu et al., 2021, arXiv 2106.09685", "add", "a low-rank update of frozen linear maps",
                         "r (d_in + d_out) a site"]


def test_methods_counts_on_a_model(cli, shelf):
    result = cli("methods", "--model", shelf / "bert")
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[2:]}
    assert set(rows) == set(names())
    # 2 blocks, 2 sites, rank 8: 2 * 2 * 8 * (32 + 32); the head of two labels: 2 * 32 + 2
    assert rows["lora"][1:4] == ["2,048", "0", "66"]
    assert rows["linear_probe"][1] == "0"


def test_methods_says_why_one_cannot_go(cli, shelf):
    result = cli("methods", "--model", shelf / "t5")
    row = next(line for line in result.stdout.splitlines() if line.startswith("bitfit "))
    assert "BitFit trains biases, and t5 has none there." in row


def test_methods_within_a_budget_can_be_copied_into_a_run(cli, shelf, recipe):
    result = cli("methods", "--model", shelf / "bert", "--budget", "600")
    rows = [re.split(r" {2,}", line) for line in result.stdout.splitlines()[2:]]
    # 2 blocks, 2 sites, 64 a rank; tokens of 32; 5 norms of 2 * 32, beside which 4 adapters of 97 are too many
    within = {row[0]: row[1] for row in rows if row[0].startswith("'method=")}
    assert within["'method={name: lora, rank: 2}'"] == "512"
    assert within["'method={name: prompt_tuning, length: 18}'"] == "576"
    assert within["'method={name: norm_tuning}'"] == "320"
    assert next(row for row in rows if row[0] == "houlsby")[-1] == "the least, at bottleneck: 1"
    for setting, numbers in within.items():
        checked = cli("check", recipe(), *shlex.split(setting))
        assert checked.exit_code == 0, checked.output
        told = {line.split()[0]: line.split()[-1] for line in checked.stdout.splitlines() if line.strip()}
        total = sum(int(told[key].replace(",", "")) for key in ("adapter", "norms"))
        assert total == int(numbers.replace(",", "")) <= 600


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("size", [None, "100%"])
def test_a_name_or_setting_is_whole_on_a_terminal(cli, shelf, monkeypatch, width: int, size: str | None):
    monkeypatch.setenv("COLUMNS", str(width))
    for module in (console, sys.modules["slimtune.cli.methods"]):
        monkeypatch.setattr(module, "is_terminal", lambda: True)
    result = cli("methods", *(("--model", shelf / "bert", "--budget", size) if size else ()))
    assert result.exit_code == 0
    drawn = [line for line in result.stdout.splitlines() if line.startswith("│")]
    first = [cell for line in drawn if (cell := line.split("│")[1].strip())]
    assert [re.sub(r"'method={name: (\w+)[^']*}'", r"\1", cell) for cell in first] == names()
    assert max(map(len, result.stdout.splitlines())) <= width
    assert ("Left out at this width" in result.stdout) == (width == 80)


def test_inspect_shows_the_anatomy(cli, shelf):
    result = cli("inspect", shelf / "bert")
    assert result.exit_code == 0
    assert "bert.encoder.layer.0.attention.self.query" in result.stdout
    assert "head: classifier" in result.stdout


def test_check_counts_without_training(cli, recipe, tmp_path):
    result = cli("check", recipe())
    assert result.exit_code == 0, result.output
    rows = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1].strip() for line in result.stdout.splitlines()
            if "  " in line}
    # rank 4 on q and v of two blocks; 58 of 64 texts are left to train on; batches of 8
    assert rows["adapter"] == "1,024"
    assert rows["head"] == "66"
    assert rows["gradients"] == "4.4 kB"
    assert rows["steps an epoch"] == "8"
    assert rows["steps"] == "4"
    assert "trained" in result.stdout.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("override", "said"), [
    ("method.sites=[mlp.gate]", "SiteError: method LoRA asked for site 'mlp.gate', which bert does not have."),
    ("data.train=nothere.csv", "DataError: nothere.csv: no such file."),
    ("data.label=lable", "no column 'lable' (data.label)"),
    ("data.max_length=1000", "data.max_length: 1000 tokens, but the model reads at most 64"),
    ("model=minlim", "Did you mean 'minilm'?"),
    ("method.blocks=[7]", "SiteError"),
])
@pytest.mark.parametrize("verb", ["check", "tune"])
def test_what_fits_no_model_or_data_is_bad_input_and_leaves_no_folder(cli, recipe, tmp_path, verb, override, said):
    result = cli(verb, recipe(), override)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


def test_check_prints_the_schema(cli):
    tree = json.loads(cli("check", "--schema").stdout)
    assert tree["required"] == ["model", "method", "data"]
    assert tree["additionalProperties"] is False


def test_tables_are_drawn_on_a_terminal_and_plain_elsewhere(monkeypatch, capsys):
    rows = [["lora", "1,024", "a [b]"], ["full", "12", ""]]
    console.table(["method", "numbers", "note"], rows, "title")
    plain = capsys.readouterr().out
    assert plain == "title\nmethod  numbers  note\nlora      1,024  a [b]\nfull         12\n"
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    console.table(["method", "numbers", "note"], rows, "title")
    drawn = capsys.readouterr().out
    assert "│" in drawn or "┃" in drawn
    assert "a [b]" in drawn
