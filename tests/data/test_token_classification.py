"""Words with tags: on the first token of each word, nowhere else."""
import json

import pytest

from slimtune.data import DataSpec, prepare
from slimtune.data.examples import IGNORED
from slimtune.errors import DataError

ROWS = [(["Add", "another", "song"], ["O", "O", "B-item"]), (["the", "Cita", "Romántica", "playlist"],
                                                          ["O", "B-list", "I-list", "O"])]


def write(folder, rows=ROWS, joined=False):
    rows = [{"tokens": " ".join(w) if joined else w, "tags": " ".join(t) if joined else t} for w, t in rows]
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataSpec(task="token_classification", train=str(path), text="tokens", label="tags", validation_fraction=0)


@pytest.mark.parametrize("joined", [False, True])
def test_tags_stand_on_first_tokens(tmp_path, minilm, joined):
    data = prepare(write(tmp_path, joined=joined), minilm)
    assert data.label_names == ("B-item", "B-list", "I-list", "O")
    assert data.train is not None
    for row, (words, tags) in zip(data.train.rows, ROWS, strict=True):
        assert row["input_ids"] == minilm(" ".join(words))["input_ids"]
        expected, position = [IGNORED], 1     # the slow way: tokenise each word alone and count its tokens
        for word, tag in zip(words, tags, strict=True):
            pieces = minilm.tokenize(word)
            expected += [data.label_names.index(tag)] + [IGNORED] * (len(pieces) - 1)
            position += len(pieces)
        assert row["labels"] == [*expected, IGNORED]
        assert len(row["labels"]) == position + 1 == len(row["input_ids"])
    assert any(len(minilm.tokenize(word)) > 1 for words, _ in ROWS for word in words)


def test_padded_labels_are_not_scored(tmp_path, minilm):
    data = prepare(write(tmp_path), minilm)
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["labels"] != IGNORED).sum() == 7


def test_words_that_are_cut_off_lose_their_tags_and_it_is_said(tmp_path, minilm, caplog):
    with caplog.at_level("INFO", "slimtune"):
        data = prepare(write(tmp_path).model_copy(update={"max_length": 4}), minilm)
    assert sum(label != IGNORED for row in data.train or [] for label in row["labels"]) == 4
    assert "3 tags are not scored" in caplog.text


@pytest.mark.parametrize(("rows", "message"), [
    ([(["a", "b"], ["O"]), (["c"], ["B-x"])], "line 1: 2 words but 1 tags"),
    ([(["a", "b"], ["O", "B-x"]), ([], [])], r"1 of 2 rows are empty in column 'tokens' \(line 2\)"),
    ([(["a"], ["O"]), (["b", 3], ["O", "B-x"])], "line 2, column 'tokens': 3 is not text"),
    ([(["a"], ["O"]), (["b"], ["O"])], "holds fewer than two tags: O"),
    ([(["a"], ["O"]), (["b"], [None])], "line 2, column 'tags': None is not a label"),
])
def test_damage_is_named(tmp_path, words, rows, message):
    with pytest.raises(DataError, match=message):
        prepare(write(tmp_path, rows), words)


def test_a_tag_that_train_lacks_is_named(tmp_path, words):
    spec = write(tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "tags": ["O", "B-song"]}))
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: label 'B-song' is not among the labels of train"):
        prepare(spec.model_copy(update={"test": str(tmp_path / "test.jsonl")}), words)


def test_byte_level_tokenizers_must_be_told_of_words(tmp_path):
    from tokenizers import pre_tokenizers
    from transformers import GPT2TokenizerFast

    from slimtune.io.models import load_tokenizer

    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    GPT2TokenizerFast(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    spec = write(tmp_path)
    with pytest.raises(DataError, match=r"'a', 'b' is read as 'ab'\.\n  Load it with add_prefix_space=True"):
        prepare(spec, load_tokenizer(tmp_path))
    tokenizer = load_tokenizer(tmp_path, words=True)
    row = prepare(spec, tokenizer).train.rows[0]
    assert tokenizer.decode(row["input_ids"]) == " Add another song"
    assert [i for i, label in enumerate(row["labels"]) if label != IGNORED] == [0, 4, 12]


def test_snips_as_slots(shared, minilm, tmp_path):
    raw = (shared / "snips" / "validate_AddToPlaylist.json").read_bytes().decode("utf-8", "replace")
    rows = []
    for entry in json.loads(raw)["AddToPlaylist"]:
        words, tags = [], []
        for part in entry["data"]:
            pieces, slot = part["text"].split(), part.get("entity")
            words += pieces
            tags += [f"{'I' if i else 'B'}-{slot}" if slot else "O" for i in range(len(pieces))]
        rows.append((words, tags))
    data = prepare(write(tmp_path, rows), minilm)
    assert len(data.train or []) == 100
    assert {"O", "B-playlist", "I-playlist"} < set(data.label_names)
    scored = sum(label != IGNORED for row in data.train or [] for label in row["labels"])
    assert scored == sum(len(words) for words, _ in rows)
