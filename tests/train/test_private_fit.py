"""Private runs: the ledger's numbers, a stop at any step, and what stands against privacy."""
import json
import os
import shutil
import signal

import pytest
import torch
from train_toys import SPEC, accuracy, attached, collate, rows, run, sha

import slimtune as st
from slimtune.errors import DeltaError, MethodError, RecipeError
from slimtune.privacy import PrivacySpec
from slimtune.testing import tiny
from slimtune.train import TrainSpec, fit
from slimtune.train.checkpoint import checkpoints, read_checkpoint
from slimtune.train.guard import Interrupted

PLAIN = TrainSpec(**{**SPEC.model_dump(exclude={"gradient_accumulation"}), "steps": 5, "save_every": 1, "keep": 99,
                     "log_every": 1})
PRIVATE = PrivacySpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", batch_size=6)


def private(folder, delta=None, spec=PLAIN, privacy=PRIVATE, **options):
    return run(folder, delta, spec, privacy=privacy, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose secret is the operating system's."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    delta, result = private(folder)
    return folder, delta, result


def test_the_ledger_is_told_everywhere(whole, tmp_path):
    folder, delta, result = whole
    told = result.privacy
    assert told is not None
    wanted = {"delta": 1e-3, "noise_multiplier": 1.0, "steps": 5, "examples": 22, "batch_size": 6, "clipping": "flat",
              "sampling": "poisson", "sample_rate": 6 / 22}
    assert {key: told[key] for key in wanted} == wanted
    delta.save(tmp_path / "delta")
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["info"]["privacy"] == told
    for step, path in enumerate(reversed(checkpoints(folder)), 1):
        assert read_checkpoint(path).facts["privacy"]["history"] == [[1.0, 6 / 22, step]]
    assert {line["step"] for line in result.history} >= {1, 2, 3, 4, 5}
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in delta.parameters())


@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_goes_on_bitwise_and_spends_once(whole, tmp_path, step):
    """22 examples in draws of 6: four steps an epoch, so that 4 is a boundary; the secret comes from the checkpoint."""
    folder, delta, result = whole
    shutil.copytree(folder, tmp_path / "run")
    for path in checkpoints(tmp_path / "run"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    torch.manual_seed(step)
    again, other = private(tmp_path / "run")
    assert other.resumed_from is not None
    assert sha(again) == sha(delta)
    assert other.history == result.history
    assert other.privacy == result.privacy


def test_another_run_draws_other_noise_unless_seeded(whole, tmp_path):
    short, seeded = PLAIN.model_copy(update={"steps": 2}), PRIVATE.model_copy(update={"seed": 3})
    found = [sha(private(tmp_path / str(i), spec=short, privacy=p)[0])
             for i, p in enumerate((PRIVATE, PRIVATE, seeded, seeded))]
    assert len({found[0], found[1], found[2]}) == 3
    assert found[2] == found[3]


def test_an_adaptive_clip_goes_on_where_it_was(tmp_path):
    privacy = PrivacySpec(noise_multiplier=1.0, delta=1e-3, batch_size=6, clipping="adaptive", count_noise=1.0, seed=1,
                          accountant="rdp")
    delta, _ = private(tmp_path / "run", privacy=privacy, spec=PLAIN.model_copy(update={"steps": 3}))
    clips = [read_checkpoint(path).facts["privacy"]["clip"] for path in checkpoints(tmp_path / "run")]
    assert len(set(clips)) == 3
    for path in checkpoints(tmp_path / "run")[:2]:
        shutil.rmtree(path)
    again, _ = private(tmp_path / "run", privacy=privacy, spec=PLAIN.model_copy(update={"steps": 3}))
    assert sha(again) == sha(delta)


def test_a_run_told_to_stop_says_what_it_spent_and_its_delta_remembers(whole, tmp_path):
    def stop(event):
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    delta = attached()
    with pytest.raises(Interrupted, match=r"Spent: epsilon \d"):
        private(tmp_path / "run", delta, report=stop)
    assert delta.info["privacy"]["steps"] == 2
    with pytest.raises(DeltaError, match="differential privacy already"):
        private(tmp_path / "other", delta)
    with pytest.raises(DeltaError, match="differential privacy already"):
        private(tmp_path / "run", delta, resume=False)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()  # what is refused costs nothing
    _, result = private(tmp_path / "run", delta)
    assert result.resumed_from == tmp_path / "run" / "checkpoint-2"
    assert result.privacy == delta.info["privacy"] == whole[2].privacy


def test_a_plain_run_that_goes_on_promises_nothing(whole, tmp_path):
    _, result = run(tmp_path / "plain", spec=PLAIN)
    assert result.privacy is None
    with pytest.raises(DeltaError, match="differential privacy already"):
        run(tmp_path / "plain", whole[1], PLAIN)


def test_another_promise_is_refused_on_the_way(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    for privacy in (PRIVATE.model_copy(update={"clip": 2.0}), None):
        with pytest.raises(RecipeError, match="privacy: this run was begun with another"):
            run(tmp_path / "run", spec=PLAIN.model_copy(update={"clip": None}), privacy=privacy)


def test_a_delta_does_not_forget_what_it_spent(whole, tmp_path):
    for privacy in (PRIVATE, None):
        with pytest.raises(DeltaError, match="differential privacy already"):
            run(tmp_path / "other", whole[1], PLAIN, privacy=privacy)


def test_batch_settings_that_make_no_sense_are_refused(tmp_path):
    for change, what in (({"gradient_accumulation": 2}, "gradient_accumulation"), ({"cache": True}, "cache"),
                         ({"clip": 3.0}, "clip")):
        with pytest.raises(RecipeError, match=f"train.{what}"):
            private(tmp_path, spec=PLAIN.model_copy(update=change))


def test_batch_norm_is_refused_before_the_first_step(tmp_path):
    delta = attached()
    delta.model.dropout = torch.nn.BatchNorm1d(32)
    with pytest.raises(MethodError, match="batch norm mixes"):
        private(tmp_path, delta)
    assert not checkpoints(tmp_path)


def test_without_noise_and_clip_it_learns_as_the_plain_run_of_whole_batches(tmp_path):
    """Rate 1: every step draws all examples, so the order does not matter either."""
    spec = PLAIN.model_copy(update={"batch_size": 22, "steps": 3})
    data, found = rows(22), []
    for i, privacy in enumerate((None, PrivacySpec(noise_multiplier=0.0, clip=1e9, delta=1e-3, batch_size=22))):
        delta = st.attach(tiny("bert").double(), st.methods.LoRA(rank=2))
        physical = spec if privacy is None else spec.model_copy(update={"batch_size": 5})
        fit(delta, data, None, collate, accuracy, physical.model_copy(update={"clip": None}), tmp_path / str(i),
            privacy=privacy)
        found.append(delta.state())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_causal_texts_train_privately(tmp_path):
    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(12)]

    def padded(batch):
        made = collate(batch) if "labels" not in batch[0] else collate([{"input_ids": r["input_ids"]} for r in batch])
        return made | {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    delta = st.attach(tiny("gpt2"), st.methods.PromptTuning(length=3))
    before = sha(delta)
    result = fit(delta, texts, None, padded, None, PLAIN.model_copy(update={"steps": 2}), tmp_path,
                 privacy=PrivacySpec(epsilon=8, delta=1e-3, accountant="rdp", batch_size=4))
    assert result.privacy is not None
    assert 7.9 < result.privacy["epsilon"] <= 8
    assert sha(delta) != before
