"""Texts to continue and texts to turn into others: nothing is lost, nothing is scored that should not be."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.data import DataSpec, metrics, prepare
from slimtune.data.language_modeling import blocks
from slimtune.data.metrics import token_loss
from slimtune.errors import DataError


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=7)), st.integers(1, 6))
def test_blocks_are_the_stream(texts, length):
    cut = blocks(texts, length)
    assert [token for block in cut for token in block] == [token for text in texts for token in text]
    assert all(len(block) == length for block in cut[:-1])


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n{"text": "d"}\n{"text": "e f a b c d e"}\n')
    return DataSpec(task="causal_lm", train=str(tmp_path / "train.jsonl"), validation_fraction=0, max_length=4)


def test_packed(lines, words):
    data = prepare(lines, words)
    text = " ".join(words.decode(row["input_ids"]) for row in data.train or [])
    assert text == "a b c [END] d [END] e f a b c d e [END]"
    assert [len(row["input_ids"]) for row in data.train or []] == [4, 4, 4, 2]
    assert all(row["labels"] == row["input_ids"] for row in data.train or [])


def test_one_text_a_row(lines, words):
    data = prepare(lines.model_copy(update={"pack": False}), words)
    assert [words.decode(row["input_ids"]) for row in data.train or []] == ["a b c [END]", "d [END]", "e f a b"]
    assert data.train.cut == 1
    batch = data.collate([data.train[0], data.train[1]])
    end = words.eos_token_id
    # The end token pads too: where it ends the text it is scored, where it pads it is not.
    assert batch["labels"][1].tolist() == [words.convert_tokens_to_ids("d"), end, -100, -100]
    assert batch["input_ids"][1].tolist()[1:] == [end, end, end]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0]


def test_the_loss_of_a_model_is_the_mean_over_our_tokens(lines, words):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    data = prepare(lines.model_copy(update={"pack": False}), words)
    batch = data.collate(data.train.rows)
    with torch.no_grad():
        out = model(**batch)
    loss, tokens = token_loss(out.logits, batch["labels"])
    assert tokens.tolist() == [3, 1, 3]
    torch.testing.assert_close(loss.sum() / tokens.sum(), out.loss)
    one_by_one = []
    for row in data.train or []:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        one_by_one.append(-sum(float(logits[t, token]) for t, token in enumerate(row["labels"][1:])))
    torch.testing.assert_close(loss, torch.tensor(one_by_one))
    perplexity = metrics("causal_lm")(loss, tokens)["perplexity"]
    assert perplexity == pytest.approx(float(out.loss.exp()), rel=1e-5)


def test_bfloat16_logits_are_scored_in_float32():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    loss, _ = token_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_loss(logits.double().float(), labels)[0])


def test_seq2seq_rows(tmp_path, words):
    (tmp_path / "train.csv").write_text("mr,ref\na b c d e,good film\nf,the film is not bad\n")
    spec = DataSpec(task="seq2seq", train=str(tmp_path / "train.csv"), text="mr", target="ref", max_length=4,
                    max_target_length=3, validation_fraction=0)
    data = prepare(spec, words)
    assert data.train.rows[0]["input_ids"] == words("a b c d")["input_ids"]
    assert data.train.rows[1]["labels"] == words("the film is")["input_ids"]
    assert data.train.cut == 2
    batch = data.collate(data.train.rows)
    assert batch["labels"][0].tolist() == [*words("good film")["input_ids"], -100]
    assert batch["attention_mask"][1].tolist() == [1, 0, 0, 0]


def test_seq2seq_damage(tmp_path, words):
    (tmp_path / "train.csv").write_text("mr,ref\na,good\nb,\n")
    spec = DataSpec(task="seq2seq", train=str(tmp_path / "train.csv"), text="mr", target="ref")
    with pytest.raises(DataError, match=r"1 of 2 rows are empty in column 'ref' \(line 3\)"):
        prepare(spec.model_copy(update={"validation_fraction": 0.0}), words)
    with pytest.raises(DataError, match=r"no column 'target' \(data.target\)"):
        prepare(spec.model_copy(update={"target": "target", "validation_fraction": 0.0}), words)


def test_e2e(shared, minilm):
    data = prepare(DataSpec(task="seq2seq", train=str(shared / "e2e_nlg" / "devset.csv"), text="mr", target="ref",
                            limit=200), minilm)
    assert (len(data.train or []), len(data.validation or [])) == (180, 20)
    row = data.train.rows[0]
    assert minilm.decode(row["input_ids"]).startswith("[CLS] name [")
    assert minilm.decode(row["labels"]).endswith(". [SEP]")


def test_tinyshakespeare(shared, minilm):
    from slimtune.data.tables import read_table

    spec = DataSpec(task="causal_lm", train=str(shared / "tinyshakespeare" / "input.txt"), limit=500, max_length=64)
    table = read_table(spec.train or "", spec)
    assert len(table) == 7222
    assert table.columns["text"][0] == "First Citizen:\nBefore we proceed any further, hear me speak."
    data = prepare(spec, minilm)
    assert {len(row["input_ids"]) for row in data.train.rows[:-1]} == {64}
    assert data.train.tokens > 10_000
