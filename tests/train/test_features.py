"""The feature cache: a run with it is the run without it, batch by batch and as a whole."""
import os
import signal

import pytest
import torch
from train_toys import SPEC, collate, entries, rows, run, sha

import slimtune as st
from slimtune.core import Unfreeze
from slimtune.errors import DataError, MethodError, RecipeError
from slimtune.testing import randomize, tiny
from slimtune.train import Interrupted, fill, fit
from slimtune.train.features import numbered
from slimtune.train.fill import open_features
from slimtune.train.signals import Signals

M = st.methods
CACHED = SPEC.model_copy(update={"cache": True})
METHODS = {"lst": M.LST(reduction=4), "linear_probe": M.LinearProbe(), "partial_k": M.PartialK(),
           "lora": M.LoRA(rank=2, dropout=0.1, blocks=(-1,))}


def spec_of(**changes):
    return CACHED.model_copy(update=changes)


def still(model):
    """The model, its dropout gone but for what a method adds."""
    return st.attach(tiny("bert"), model)


def opened(delta, folder, data=None, pad=collate, **changes):
    return open_features(delta, data or rows(), pad, spec_of(**changes), folder, Signals())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_a_cache_is_the_run_without(tmp_path, name):
    """In float32, with dropout in what trains. Once it is filled the lowest block runs twice, to check the cache."""
    plain = still(METHODS[name])
    wanted = fit(plain, rows(), None, collate, None, SPEC, tmp_path / "plain")
    delta, ran = still(METHODS[name]), []
    delta.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, a, y: ran.append(a[0].shape))

    def report(event):
        if event["event"] == "fill":
            ran.clear()

    found = fit(delta, rows(), None, collate, None, CACHED, tmp_path / "cached", report=report)
    assert len(ran) == 2
    for mine, other in zip(found.history, wanted.history, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
    for (key, value), other in zip(delta.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=key)
    assert entries(tmp_path / "cached") == entries(tmp_path / "plain")  # the cache is gone with the run


def test_a_cache_that_holds_another_file_fails_no_finished_run(tmp_path, caplog):
    def stray(event):
        if event["event"] == "log":
            (tmp_path / "features" / ".DS_Store").touch()

    result = fit(still(M.LinearProbe()), rows(), None, collate, None, CACHED, tmp_path, report=stray)
    assert result.steps == 9
    assert "the feature cache was not deleted" in caplog.text
    assert (tmp_path / "features" / ".DS_Store").is_file()


def pad_left(batch):
    made = collate(batch)
    shift = (made["attention_mask"] == 0).sum(1)
    made = {k: torch.stack([row.roll(int(n)) for row, n in zip(v, shift, strict=True)]) if v.dim() > 1 else v
            for k, v in made.items()}
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"].cumsum(1) <= 1, -100)}


def pad_left_and_score_all(batch):
    """The first token is predicted from where the padding ends."""
    made = pad_left(batch)
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


def pad_left_with_positions(batch):
    made = pad_left(batch)
    return {**made, "position_ids": (made["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def pad_pairs(batch):
    """Texts and targets of their own lengths, as for an encoder-decoder."""
    targets = [torch.tensor(row["input_ids"][: 2 + row["labels"]]) for row in batch]
    made = collate([{"input_ids": row["input_ids"]} for row in batch])
    return {**made, "labels": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)}


def as_images(batch):
    draws = [torch.Generator().manual_seed(row["input_ids"][0]) for row in batch]
    return {"pixel_values": torch.stack([torch.randn(3, 16, 16, generator=g, dtype=torch.float64) for g in draws]),
            "labels": torch.tensor([row["labels"] for row in batch])}


@pytest.fixture
def nondeterministic_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nondeterministic_afterwards")
@pytest.mark.parametrize(("family", "method", "pad"), [
    ("bert", M.LST(reduction=4), collate), ("llama", M.LST(reduction=4), pad_left),
    ("gpt2", M.PartialK(), pad_left_with_positions), ("t5", M.LST(reduction=4), pad_pairs),
    ("t5", M.PartialK(towers=("decoder",)), pad_pairs), ("bart", M.PartialK(towers=("decoder",)), pad_pairs),
    ("vit", M.PartialK(), as_images), ("swin", M.LinearProbe(), as_images)])
def test_any_batch_has_the_plain_loss_and_gradients(tmp_path, family, method, pad):
    """Batches that were never filled together, of other widths than each example alone; fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    delta = randomize(st.attach(tiny(family).double(), method))
    data = rows(9)
    features = opened(delta, tmp_path, data, pad)
    for numbers in ([0, 1, 2, 3], [8, 4], [5], [7, 6, 0]):
        found = []
        for cached in (False, True):
            inputs = numbered(pad)([(i, data[i]) for i in numbers])
            for p in delta.parameters():
                p.grad = None
            if cached:
                with features(inputs):
                    loss = delta.model(**inputs).loss
                    loss.backward()
            else:
                inputs.pop("slimtune_index")
                loss = delta.model(**inputs).loss
                loss.backward()
            found.append([loss.detach(), *(p.grad for p in delta.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_states_that_depend_on_padding_are_refused(tmp_path):
    """GPT-2 counts its positions from the left of the batch, padding included."""
    with pytest.raises(DataError, match=r"differ in state decoder\.0.*\n.*position_ids"):
        opened(st.attach(tiny("gpt2"), M.PartialK()), tmp_path, rows(9), pad_left)
    with pytest.raises(DataError, match=r"differ in the loss.*\n.*scores the first token"):
        opened(st.attach(tiny("llama"), M.LST(reduction=4)), tmp_path, rows(9), pad_left_and_score_all)


def test_what_cannot_be_cached_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(MethodError, match="no hidden state stays the same"):
        opened(still(M.LoRA(rank=2)), tmp_path)
    draw = torch.Generator().manual_seed(0)

    def noisy(batch):
        return {**collate(batch), "noise": torch.randn(1, generator=draw)}

    with pytest.raises(DataError, match="example 0 is another each time"):
        opened(still(M.LinearProbe()), tmp_path, pad=noisy)

    class Augmented(list):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "input_ids": [3 + self.epoch, *row["input_ids"][1:]]} if i == 21 else row

    with pytest.raises(DataError, match="example 21 is another each time"):
        opened(still(M.LinearProbe()), tmp_path, Augmented(rows()))
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["lst", "partial_k"])
def test_a_stopped_run_reads_the_same_states(tmp_path, name):
    def tell(event):
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def delta():
        return st.attach(tiny("bert", dropout=True), METHODS[name])

    whole, wanted = run(tmp_path / "whole", delta(), CACHED)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", delta(), CACHED, report=tell)
    assert "features" in entries(tmp_path / "run")
    again, result = run(tmp_path / "run", delta(), CACHED)
    assert sha(again) == sha(whole)
    assert result.history == wanted.history
    with pytest.raises(RecipeError, match=r"train\.cache: this run was begun with True, not with False"):
        run(tmp_path / "run", delta(), SPEC)
    events = []
    run(tmp_path / "run", delta(), CACHED, report=events.append)  # it is over: nothing is filled to do nothing
    assert "fill" not in [event["event"] for event in events]


def test_one_cache_serves_many_runs(tmp_path, monkeypatch):
    """A side network's holds what a head reads; head, seed and learning rate are not part of it."""
    named, count, filled = str(tmp_path / "shared"), [], []
    monkeypatch.setattr(fill, "states", lambda *a, plain=fill.states: count.append(0) or plain(*a))
    for n, method in enumerate((M.LST(reduction=4), M.LinearProbe(), M.LST(reduction=2, blocks=(0,)))):
        model = tiny("bert")
        torch.nn.init.normal_(model.classifier.weight)
        spec = spec_of(cache=named, seed=n, learning_rate=0.01 * n + 0.01)
        fit(st.attach(model, method), rows(), None, collate, None, spec, tmp_path / f"{n}")
        assert "features" not in entries(tmp_path / f"{n}")
        filled.append(len(count))
    assert filled[0] > 5
    assert filled == filled[:1] * 3
    opened(still(M.LinearProbe()), tmp_path, cache=str(tmp_path / "head"))
    with pytest.raises(DataError, match=r"its states are encoder\.1; encoder\.0 is needed"):
        opened(still(M.LST(reduction=4)), tmp_path, cache=str(tmp_path / "head"))


def test_bfloat16_is_half_as_large_and_near(tmp_path):
    exact, rough = (opened(still(M.LST(reduction=4)), tmp_path / d, cache_dtype=d) for d in ("model", "bfloat16"))
    sizes = [(tmp_path / d / "features" / "encoder.1.bin").stat().st_size for d in ("model", "bfloat16")]
    assert sizes[0] == 2 * sizes[1]
    for i in range(5):
        a, b = (f.file.rows("encoder.0", i) for f in (exact, rough))
        assert torch.equal(a.bfloat16(), b)


def test_a_method_that_starts_from_data_gets_it_once(tmp_path):
    seen = []

    class Starts(Unfreeze):
        @property
        def needs_data(self):
            return True

        def tensors(self, build):
            return []

        def calibrate(self, delta, batches):
            seen.append([batch["input_ids"].tolist()[0] for batch in batches])

    def tell(event):
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path, still(Starts()), SPEC, report=tell)
    run(tmp_path, still(Starts()), SPEC)
    assert seen == [[row["input_ids"] for row in rows()]]
