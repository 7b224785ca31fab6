"""Texts, pairs and numbers: what a model gets, that it is the same in any process, and real files."""
import json
import pickle
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from slimtune.data import DataSpec, prepare
from slimtune.data.splits import hold_out
from slimtune.data.tasks import prepare_unlabelled
from slimtune.errors import DataError


@pytest.fixture
def reviews(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(
        f"{'a b' if i % 3 else 'c d e'},{'pos' if i % 3 else 'neg'}\n" for i in range(30)))
    (tmp_path / "test.csv").write_text("text,label\nthe film is good,pos\nbad,neg\n")
    return tmp_path


def spec_of(folder, **values):
    return DataSpec(**{"task": "classification", "train": str(folder / "train.csv"), **values})


def test_rows_are_the_tokenizers_own(reviews, words):
    data = prepare(spec_of(reviews, test=str(reviews / "test.csv"), validation_fraction=0), words)
    assert (data.label_names, data.num_labels, data.problem) == (("neg", "pos"), 2, "single_label_classification")
    assert data.test is not None
    assert data.test.rows[0] == {"input_ids": words("the film is good")["input_ids"], "attention_mask": [1] * 4,
                                 "labels": 1}
    assert data.validation is None
    assert data.train is not None
    assert data.train.tokens == 10 * 3 + 20 * 2


def test_a_batch_is_padded_on_the_right_to_its_longest(reviews, words, caplog):
    words.padding_side = "left"
    data = prepare(spec_of(reviews, train=str(reviews / "test.csv"), validation_fraction=0), words)
    batch = data.collate([data.train[0], data.train[1]])
    end = words.eos_token_id
    assert batch["input_ids"][1].tolist() == [words.convert_tokens_to_ids("bad"), end, end, end]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert "no padding token: '[END]'" in caplog.text


def test_loaders_with_workers_read_it(reviews, words):
    data = prepare(spec_of(reviews), words)
    assert data.train is not None
    copy = pickle.loads(pickle.dumps(data))
    loader = DataLoader(copy.train, batch_size=9, collate_fn=copy.collate)
    labels = torch.cat([batch["labels"] for batch in loader])
    assert labels.tolist() == [row["labels"] for row in data.train]


def test_cut_texts_are_counted_and_said(reviews, words, caplog):
    (reviews / "train.csv").write_text("text,label\na b c d e,x\na b c d,y\n")
    with caplog.at_level("INFO", "slimtune"):
        data = prepare(spec_of(reviews, max_length=4, validation_fraction=0), words)
    assert data.train is not None
    assert (data.train.cut, len(data.train.rows[0]["input_ids"])) == (1, 4)
    assert "train: 1 of 2 texts are longer than 4 tokens and were cut" in caplog.text


def test_length_beyond_the_model_is_refused(reviews, words):
    with pytest.raises(DataError, match="513 tokens, but the model reads at most 512"):
        prepare(spec_of(reviews, max_length=513), words)


def test_a_label_that_train_lacks_is_named(reviews, words):
    (reviews / "test.csv").write_text("text,label\ngood,pos\nbad,nag\n")
    with pytest.raises(DataError, match=r"test.csv, line 3: label 'nag' is not among the labels of train\."
                                        r"\n  They are: neg pos\n  Did you mean 'neg'\?"):
        prepare(spec_of(reviews, test=str(reviews / "test.csv")), words)


def test_labels_can_be_given_in_an_order(reviews, words):
    data = prepare(spec_of(reviews, labels=("pos", "neg", "other")), words)
    assert data.train is not None
    assert (data.num_labels, data.label_names) == (3, ("pos", "neg", "other"))
    assert Counter(row["labels"] for row in data.train) == {0: 18, 1: 9}


def test_without_train_the_labels_must_be_known(reviews, words):
    with pytest.raises(DataError, match=r"data\.labels: without training data"):
        prepare(DataSpec(task="classification", test=str(reviews / "test.csv")), words)
    data = prepare(DataSpec(task="classification", test=str(reviews / "test.csv"), labels=("neg", "pos")), words)
    assert data.train is None
    assert [row["labels"] for row in data.test or []] == [1, 0]


def test_a_limit_does_not_lose_labels(reviews, words):
    data = prepare(spec_of(reviews, limit=1, validation_fraction=0, test=str(reviews / "test.csv")), words)
    assert len(data.train or []) == 1
    assert data.label_names == ("neg", "pos")


def test_unlabelled_texts_for_prediction(reviews, words):
    from slimtune.data.tables import Table

    rows = prepare_unlabelled(spec_of(reviews), words, Table("typed", {"text": ["a b", "c"]}, [1, 2]))
    assert [len(row["input_ids"]) for row in rows] == [2, 1]
    assert "labels" not in rows[0]
    for task in ("token_classification", "causal_lm", "seq2seq"):
        spec = DataSpec(task=task, train="x", pack=False)
        row = prepare_unlabelled(spec, words, Table("typed", {"text": ["a b"]}, [1]))[0]
        assert words.decode(row["input_ids"]).startswith("a b")


def test_regression_labels_are_floats(tmp_path, words):
    (tmp_path / "train.csv").write_text("one,two,score\na,b c,1.5\nd,e,-2\n")
    data = prepare(spec_of(tmp_path, task="regression", text="one", pair="two", label="score",
                           validation_fraction=0), words)
    batch = data.collate([data.train[0], data.train[1]])
    assert (data.problem, data.num_labels, data.label_names) == ("regression", 1, ())
    assert batch["labels"].tolist() == [1.5, -2.0]
    assert batch["labels"].dtype == torch.float32
    assert data.train.rows[0]["input_ids"] == words("a", "b c")["input_ids"]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=60), st.floats(0.01, 0.5), st.integers(0, 99))
def test_held_out_rows_follow_the_classes(classes, fraction, seed):
    kept, held = hold_out(len(classes), fraction, seed, classes)
    assert sorted(kept + held) == list(range(len(classes)))
    sizes, left = Counter(classes), Counter(classes[i] for i in held)
    for name, size in sizes.items():
        assert abs(left[name] - size * fraction) <= 1
        assert left[name] < size
    loners = sum(size == 1 for size in sizes.values())
    wanted = max(round(len(classes) * fraction), 1) if len(classes) > 1 else 0
    assert wanted - loners <= len(held) <= wanted


def test_rows_of_a_split_without_classes():
    kept, held = hold_out(100, 0.25, seed=3)
    assert (len(kept), len(held)) == (75, 25)
    assert held != hold_out(100, 0.25, seed=4)[1]


SCRIPT = """
import json, random, sys, torch
from hashlib import sha256
from slimtune.data import DataSpec
from slimtune.data.splits import read_splits
random.seed(int(sys.argv[2])); torch.manual_seed(int(sys.argv[2]))
splits = read_splits(DataSpec(**json.loads(sys.argv[1])))
print(json.dumps([splits.train.numbers, splits.validation.numbers]))
"""


def test_the_same_seed_gives_the_same_rows_in_any_process(reviews):
    from slimtune.data.splits import read_splits

    spec = spec_of(reviews, limit=20, seed=7)
    here = read_splits(spec)
    found = subprocess.run([sys.executable, "-c", SCRIPT, spec.model_dump_json(), "7"], check=True, text=True,
                           capture_output=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)})
    assert json.loads(found.stdout) == [here.train.numbers, here.validation.numbers]
    other = read_splits(spec.model_copy(update={"seed": 8}))
    assert sorted(other.train.numbers) != sorted(here.train.numbers)
    smaller = read_splits(spec.model_copy(update={"limit": 10, "validation_fraction": 0.0}))
    whole = read_splits(spec.model_copy(update={"validation_fraction": 0.0}))
    assert smaller.train.numbers == whole.train.numbers[:10]


def test_banking77(shared, minilm):
    home = shared / "banking77"
    data = prepare(spec_of(home, label="category", test=str(home / "test.csv"), max_length=64), minilm)
    assert [len(part or []) for part in (data.train, data.validation, data.test)] == [9003, 1000, 3080]
    assert list(data.label_names) == sorted(json.loads((home / "categories.json").read_text()))
    assert Counter(row["labels"] for row in data.test or []) == dict.fromkeys(range(77), 40)
    assert len({row["labels"] for row in data.validation or []}) == 77
    assert minilm.decode(data.test.rows[0]["input_ids"]) == "[CLS] how do i locate my card? [SEP]"


def test_sst2_and_goemotions_keep_their_quotes(shared, words):
    home = shared / "sst2"
    data = prepare(DataSpec(task="classification", test=str(home / "test.tsv"), text="sentence", labels=[0, 1]), words)
    assert Counter(row["labels"] for row in data.test or []) == {0: 428, 1: 444}
    from slimtune.data.tables import read_table

    table = read_table(str(shared / "goemotions" / "dev.tsv"), DataSpec(task="classification", train="x"))
    assert len(table) == 5426
    assert sum('"' in text for text in table.columns["text"]) > 100


def test_stsb_pairs(shared, minilm):
    data = prepare(DataSpec(task="regression", train=str(shared / "stsb" / "dev.tsv"), text="sentence1",
                            pair="sentence2", label="score", validation_fraction=0), minilm)
    assert len(data.train or []) == 1500
    assert data.train.rows[0]["labels"] == 5.0
    assert minilm.decode(data.train.rows[0]["input_ids"]) == (
        "[CLS] a man with a hard hat is dancing. [SEP] a man wearing a hard hat is dancing. [SEP]")
    assert set(data.train.rows[0]["token_type_ids"]) == {0, 1}


def test_the_same_examples_every_time(shared, minilm):
    spec = spec_of(shared / "banking77", label="category", limit=300, seed=1)
    digests = {sha256(json.dumps(prepare(spec, minilm).train.rows).encode()).hexdigest() for _ in range(2)}
    assert len(digests) == 1
