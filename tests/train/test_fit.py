"""fit: what it leaves behind, the best checkpoint, patience, signals, and a real model."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_toys import SPEC, accuracy, attached, collate, entries, rows, run, sha

import slimtune as st
from slimtune.errors import DataError, DeltaError, RecipeError, TrainError
from slimtune.testing import tiny
from slimtune.train import Interrupted, TrainSpec, evaluate, fit, last_checkpoint
from slimtune.train.checkpoint import read_checkpoint, step_of

MINILM = Path("/root/models/minilm-l6")


def spec_of(**changes):
    return TrainSpec(**{**SPEC.model_dump(), **changes})


def test_it_learns_and_reports(tmp_path):
    """The label is told by the first token's class among three ranges, which a linear reading can learn."""
    train = [{"input_ids": [5 + 30 * (i % 3), 50, 51, 52], "labels": i % 3} for i in range(24)]
    delta = st.attach(tiny("bert", dropout=True), st.methods.Houlsby(bottleneck=8))
    before = evaluate(delta.model, train, collate, accuracy)
    spec = spec_of(epochs=20, gradient_accumulation=1, learning_rate=5e-3, log_every=10)
    result = fit(delta, train, train, collate, accuracy, spec, tmp_path)
    assert before["accuracy"] < 0.6
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["loss"] < before["loss"] / 2
    assert result.metrics == evaluate(delta.model, train, collate, accuracy)
    assert result.steps == 120
    assert result.epochs == 20
    assert result.seconds > 0
    assert result.peak_memory_mb > 100
    assert 0 <= result.added_memory_mb < result.peak_memory_mb
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < losses[0]


def test_history_has_each_line_once(tmp_path):
    events = []
    _, result = run(tmp_path, spec=spec_of(log_every=3, eval_every=4, steps=10, save_every=5), report=events.append)
    assert [line["step"] for line in result.history if "loss" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in result.history if "eval_loss" in line] == [4, 8, 10]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 11))
    assert [e["step"] for e in events if e["event"] == "save"] == [5, 10]
    assert [e["event"] for e in events].count("evaluate") == 3
    assert all(e["steps"] == 10 for e in events)
    assert set(result.history[0]) == {"step", "loss", "grad_norm", "learning_rate", "epoch"}


def test_the_folder_holds_no_pickle_and_nothing_more(tmp_path):
    run(tmp_path, spec=spec_of(best="accuracy"))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"metrics.jsonl", "checkpoint.json", "delta.safetensors", "optimizer.safetensors",
                     "rng.safetensors", "trainer_state.json"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path


def test_a_checkpoint_holds_the_delta_alone(tmp_path):
    delta, _ = run(tmp_path)
    found = read_checkpoint(last_checkpoint(tmp_path))
    assert set(found.delta) == set(delta.state())
    assert {key.rpartition("/")[0] for key in found.optimizer} == {name for name, _ in delta.named_parameters()}
    assert all(torch.equal(found.delta[name], tensor) for name, tensor in delta.state().items())


def test_the_model_is_left_as_it_was(tmp_path):
    delta = attached()
    model = delta.model
    model.eval()
    base = {name: p.clone() for name, p in st.core.base_parameters(model).items() if "classifier" not in name}
    attributes, threads, cache = set(vars(model)), torch.get_num_threads(), model.config.use_cache
    run(tmp_path, delta, spec_of(threads=1, gradient_checkpointing=True, precision="bfloat16"))
    assert set(vars(model)) == attributes
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert torch.get_num_threads() == threads
    assert model.config.use_cache == cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    now = st.core.base_parameters(model)
    assert all(torch.equal(now[name], value) for name, value in base.items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = run(tmp_path / "plain")
    saved, _ = run(tmp_path / "saved", spec=spec_of(gradient_checkpointing=True))
    for name, value in plain.state().items():
        torch.testing.assert_close(saved.state()[name], value, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near_and_not_equal(tmp_path):
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    other = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    _, exact = run(tmp_path / "exact", delta)
    _, rough = run(tmp_path / "rough", other, spec_of(precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert rough.metrics["loss"] == pytest.approx(exact.metrics["loss"], abs=0.02)
    assert sha(delta) != sha(other)


def test_threads_hold_in_the_run_alone(tmp_path):
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(tmp_path, spec=spec_of(threads=1), report=lambda event: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_best_is_loaded_at_the_end(tmp_path):
    """A learning rate that ruins the model: the best is early, and its checkpoint is kept beside the newest."""
    spec = spec_of(best="loss", eval_every=1, save_every=4, keep=1, epochs=4, schedule="constant", learning_rate=0.3,
                   gradient_accumulation=1)
    delta, result = run(tmp_path, spec=spec)
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < max(losses) - 4
    assert result.best == tmp_path / f"checkpoint-{best}"
    assert result.metrics["loss"] == losses[best]
    assert evaluate(delta.model, rows(9, seed=1), collate, accuracy)["loss"] == losses[best]
    assert entries(tmp_path) == sorted([f"checkpoint-{best}", f"checkpoint-{max(losses)}", "metrics.jsonl"])
    last, _ = run(tmp_path / "last", spec=TrainSpec(**{**spec.model_dump(), "best": None}))
    assert sha(last) != sha(delta)


def test_more_may_be_better(tmp_path):
    spec = spec_of(best="accuracy", eval_every=1, epochs=4, learning_rate=0.02)
    _, result = run(tmp_path, spec=spec)
    values = {line["step"]: line["eval_accuracy"] for line in result.history if "eval_accuracy" in line}
    assert result.metrics["accuracy"] == max(values.values())
    assert step_of(result.best) == next(step for step, value in values.items() if value == max(values.values()))


def test_a_damaged_best_is_never_silently_another(tmp_path):
    spec = spec_of(best="loss", eval_every=1, epochs=2)

    def damage(event):
        if event["event"] == "save" and event["step"] == event["steps"]:
            for path in tmp_path.glob("again/checkpoint-*/delta.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(DeltaError, match=r"delta\.safetensors has"):
        run(tmp_path / "again", spec=spec, report=damage)


def test_patience(tmp_path):
    spec = spec_of(best="loss", patience=3, eval_every=1, save_every=50, epochs=9, schedule="constant",
                   learning_rate=0.3, gradient_accumulation=1, warmup=0.0)
    delta, result = run(tmp_path, spec=spec)
    losses = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    assert result.stopped_early
    assert len(losses) == losses.index(min(losses)) + 1 + 3
    assert result.steps == len(losses)
    again, other = run(tmp_path, spec=spec)                 # it is over, and stays so
    assert other.steps == result.steps
    assert sha(again) == sha(delta)
    assert other.history == result.history


def test_the_head_has_its_own_rate(tmp_path):
    spec = spec_of(steps=1, warmup=0.0, learning_rate=1e-3, head_learning_rate=1e-1)
    before = {name: tensor.clone() for name, tensor in attached().state().items()}
    delta, _ = run(tmp_path, spec=spec)
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in delta.state().items()}
    assert moved["head.classifier.weight"] == pytest.approx(0.1, rel=1e-2)
    assert moved["encoder.0.attn.q.lora.B"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_can_be_resumed(tmp_path, number):
    """The signal comes in the middle of step 5, far from any save."""
    whole, wanted = run(tmp_path / "whole", spec=spec_of(save_every=50))

    def tell(event):
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "run", spec=spec_of(save_every=50), report=tell)
    assert caught.value.exit_code == 3
    assert number.name in str(caught.value)
    assert "of 9" in str(caught.value)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert step_of(last_checkpoint(tmp_path / "run")) in (4, 5)
    delta, result = run(tmp_path / "run", spec=spec_of(save_every=50))
    assert result.resumed_from is not None
    assert sha(delta) == sha(whole)
    assert result.history == wanted.history


def test_a_process_that_is_told_to_stop(tmp_path):
    """The exit code that the command line gives, from outside."""
    code = ("import sys, time; from pathlib import Path; from train_toys import run, SPEC\n"
            "from slimtune.errors import SlimtuneError\n"
            "def slow(event):\n"
            "    print(event['event'], flush=True); time.sleep(0.05)\n"
            "try: run(Path(sys.argv[1]), spec=SPEC.model_copy(update={'epochs': 200.0}), report=slow)\n"
            "except SlimtuneError as error: print(error); sys.exit(error.exit_code)\n")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}) as child:
        for line in child.stdout:
            if line.strip() == "step":
                child.send_signal(signal.SIGTERM)
                break
        rest = child.stdout.read()
        assert child.wait(60) == 3
    assert "interrupted by SIGTERM after step" in rest
    assert last_checkpoint(tmp_path) is not None


def test_other_seeds_are_other_runs(tmp_path):
    shas = {sha(run(tmp_path / f"{seed}", spec=spec_of(seed=seed))[0]) for seed in (0, 1, 2)}
    assert len(shas) == 3


def test_without_validation_data(tmp_path):
    delta = attached()
    result = fit(delta, rows(), None, collate, None, SPEC, tmp_path)
    assert result.metrics == {}
    assert entries(tmp_path) == ["checkpoint-6", "checkpoint-9", "metrics.jsonl"]
    with pytest.raises(RecipeError, match=r"train.best: there is no validation data"):
        fit(delta, rows(), None, collate, None, spec_of(best="loss"), tmp_path / "b")


def test_what_cannot_run_is_said_before_it_runs(tmp_path):
    with pytest.raises(DataError, match="no examples to train on"):
        fit(attached(), [], None, collate, None, SPEC, tmp_path / "a")
    delta = attached()
    with delta.disabled(), pytest.raises(DeltaError, match="not active"):
        run(tmp_path / "b", delta)
    with pytest.raises(RecipeError, match=r"is more or less of 'accurcy' better"):
        run(tmp_path / "c", spec=spec_of(best="accurcy"))
    with pytest.raises(TrainError, match=r"no metric 'macro_f1'.*\n.*It has: loss accuracy"):
        run(tmp_path / "d", spec=spec_of(best="macro_f1"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match="cannot be made"):
        run(tmp_path / "file" / "run")
    assert not (tmp_path / "a").exists()


def test_no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    run(tmp_path, spec=spec_of(steps=2))


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"{MINILM} is not on this machine")
def test_a_real_model(tmp_path):
    """all-MiniLM-L6-v2 tells praise from blame after 30 steps; a new process gets the same logits."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM, local_files_only=True)
    things = ["film", "meal", "book", "hotel", "phone", "song", "chair", "trip"]
    good, bad = ["wonderful", "excellent", "lovely", "great"], ["awful", "terrible", "dreadful", "bad"]
    texts = [(f"The {thing} was {word}.", label) for label, words in enumerate((bad, good)) for word in words
             for thing in things]
    data = [{**tokenizer(text), "labels": label} for text, label in texts]
    train, held = [row for i, row in enumerate(data) if i % 4], data[::4]

    def pad(batch):
        labels = torch.tensor([row["labels"] for row in batch])
        plain = [{k: v for k, v in row.items() if k != "labels"} for row in batch]
        return {**tokenizer.pad(plain, return_tensors="pt"), "labels": labels}

    def new():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2, local_files_only=True)
        return st.attach(model, st.methods.LoRA(rank=4, dropout=0.1))

    spec = TrainSpec(steps=30, batch_size=16, learning_rate=2e-3, best="accuracy", eval_every=10, threads=1)
    delta = new()
    result = fit(delta, train, held, pad, accuracy, spec, tmp_path / "run")
    assert result.metrics["accuracy"] >= 0.9
    assert delta.count().trainable < 0.02 * 22_713_216 + delta.count().head
    delta.save(tmp_path / "delta")
    fresh = new()
    fresh.detach()
    again = st.load(fresh.model, tmp_path / "delta")
    assert evaluate(again.model, held, pad, accuracy) == result.metrics
