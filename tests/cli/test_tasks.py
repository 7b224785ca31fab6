"""Every task from recipe to predictions, on tiny models: what is scored, and what predict prints."""
import json
import math

import pytest
import torch
import yaml
from cli_toys import sentences, write_csv

from slimtune.data import DataSpec
from slimtune.recipe import digest_run, predict_run, read_recipe, run
from slimtune.recipe.scoring import tell
from slimtune.recipe.use import load_run
from slimtune.train import Predictions


def tuned(tmp_path, model, data, method="lora", **train):
    tree = {"model": str(model), "method": method, "data": {"max_length": 16, **data}, "output": str(tmp_path / "run"),
            "train": {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, **train}}
    result = run(read_recipe(yaml.safe_dump(tree)))
    assert digest_run(tmp_path / "run") == result.values["predictions_sha256"]
    return result


def test_pairs(cli, shelf, tmp_path):
    rows = [(a, b, str(i % 2))
            for i, ((a, _), (b, _)) in enumerate(zip(sentences(40, 0), sentences(40, 3), strict=True))]
    file = write_csv(tmp_path / "pairs.csv", rows, ("one", "two", "same"))
    data = {"task": "classification", "train": str(file), "text": "one", "pair": "two", "label": "same"}
    result = tuned(tmp_path, shelf / "bert", data)
    assert set(result.metrics) == {"validation"}
    assert result.values["labels"] == ["0", "1"]
    one = cli("predict", tmp_path / "run", "--text", "a film", "--pair", "the story")
    assert json.loads(one.stdout)["label"] in ("0", "1")
    assert one.stdout != cli("predict", tmp_path / "run", "--text", "a film", "--pair", "a good actor").stdout
    missing = cli("predict", tmp_path / "run", "--text", "a film")
    assert missing.exit_code == 2
    assert "two" in missing.stderr


def test_regression(shelf, tmp_path):
    rows = [(text, str(len(text) / 10)) for text, _ in sentences(40, 0)]
    file = write_csv(tmp_path / "lengths.csv", rows, ("text", "label"))
    result = tuned(tmp_path, shelf / "bert", {"task": "regression", "train": str(file), "test": str(file)})
    assert set(result.metrics["test"]) == {"loss", "pearson", "spearman", "mse"}
    assert result.metrics["test"]["loss"] == pytest.approx(result.metrics["test"]["mse"], rel=1e-4)
    found = [line["score"] for line in predict_run(tmp_path / "run", file)]
    mse = sum((guess - float(row[1])) ** 2 for guess, row in zip(found, rows, strict=True)) / len(rows)
    assert mse == pytest.approx(result.metrics["test"]["mse"], rel=1e-4)


def test_token_classification(shelf, tmp_path):
    good = {"good", "fine", "great", "lovely"}
    rows = [{"text": text.split(), "label": ["B" if word in good else "O" for word in text.split()]}
            for text, _ in sentences(48, 0)]
    file = tmp_path / "tags.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tuned(tmp_path, shelf / "bert", {"task": "token_classification", "train": str(file), "test": str(file)},
                   steps=100, learning_rate=1e-2)
    found = list(predict_run(tmp_path / "run", file))
    assert [line["words"] for line in found] == [row["text"] for row in rows]
    right = [g == t for line, row in zip(found, rows, strict=True)
             for g, t in zip(line["tags"], row["label"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(result.metrics["test"]["accuracy"])
    assert result.metrics["test"]["token_f1"] > 0.9  # the word itself tells
    long = next(predict_run(tmp_path / "run", [" ".join(["good"] * 30)]))
    assert long["tags"][13:] == ["B", *[None] * 16]  # 16 tokens, two of them special


def test_causal_language_modelling(shelf, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(text for text, _ in sentences(60, 0)))
    result = tuned(tmp_path, shelf / "gpt2", {"task": "causal_lm", "train": str(file), "test": str(file)}, "ia3")
    scores = result.metrics["test"]
    assert scores["perplexity"] == pytest.approx(math.exp(scores["token_loss"]))
    one, = predict_run(tmp_path / "run", ["the film was good"])
    run_ = load_run(tmp_path / "run")
    ids = torch.tensor([[*run_.tokenizer("the film was good")["input_ids"], run_.tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = run_.model(input_ids=ids, labels=ids).loss
    assert one["tokens"] == 4
    assert one["token_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_seq2seq(shelf, tmp_path):
    pytest.importorskip("sacrebleu", reason="slimtune[generation] is not installed")
    rows = [(text, " ".join(text.split()[:3])) for text, _ in sentences(20, 0)]
    file = write_csv(tmp_path / "pairs.csv", rows, ("text", "target"))
    result = tuned(tmp_path, shelf / "t5", {"task": "seq2seq", "train": str(file), "test": str(file),
                                            "max_target_length": 6})
    assert set(result.metrics["test"]) >= {"loss", "bleu", "chrf", "rougeL"}
    found = list(predict_run(tmp_path / "run", file))
    assert len(found) == 20
    assert all(set(line) == {"text"} for line in found)
    alone, = predict_run(tmp_path / "run", [rows[0][0]])
    assert alone == found[0]


def test_what_predictions_say():
    spec = DataSpec(task="classification", test="x.csv")
    line, = tell(spec, ("no", "yes"), Predictions(torch.tensor([[0.0, math.log(3.0)]]), None, None))
    assert line["label"] == "yes"
    assert line["scores"] == pytest.approx({"no": 0.25, "yes": 0.75})
    spec = DataSpec(task="token_classification", test="x.csv")
    scores = torch.tensor([[[0.0, 1], [1, 0], [0, 1], [0, 1], [1, 0]]])
    line, = tell(spec, ("O", "B"), Predictions(scores, None, None), [(["a", "b", "c"], [None, 0, 0, 1, None])])
    assert line == {"words": ["a", "b", "c"], "tags": ["O", "B", None]}


def test_best_is_checked_before_training(shelf, tmp_path, cli):
    tree = {"model": str(shelf / "bert"), "method": "lora", "output": str(tmp_path / "run"),
            "data": {"task": "classification", "train": str(shelf / "train.csv"), "max_length": 16},
            "train": {"steps": 2, "best": "macro_f"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    result = cli("tune", tmp_path / "r.yaml")
    assert (result.exit_code, "Did you mean 'macro_f1'?" in result.stderr) == (2, True), result.stderr
    result = cli("tune", tmp_path / "r.yaml", "train.best=loss", "data.validation_fraction=0")
    assert (result.exit_code, "no validation data" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()
