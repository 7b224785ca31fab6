"""Reading local files: round trips, and every kind of damage as a DataError that names the place."""
import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.data.columns import numbers, order_of, texts
from slimtune.data.delimited import read_delimited
from slimtune.data.spec import DataSpec
from slimtune.data.splits import read_splits
from slimtune.data.tables import read_dataset, read_table
from slimtune.errors import DataError

SPEC = DataSpec(task="classification", train="x.csv")
FIELD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6), st.sampled_from(",;\t|"))
def test_what_the_csv_module_writes_is_read_back(rows, delimiter):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    spec = SPEC.model_copy(update={"delimiter": delimiter})
    names, read, _ = read_delimited("x.csv", out.getvalue(), spec)
    assert names == ["text", "label"]
    assert [tuple(row) for row in read] == rows


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), min_size=1),
                min_size=1, max_size=6))
def test_unquoted_tsv_keeps_quotes_and_every_other_character(values):
    text = "text\tlabel\n" + "".join(f"{value}\t1\n" for value in values)
    _, rows, lines = read_delimited("x.tsv", text, SPEC)
    assert [row[0] for row in rows] == values
    assert lines == list(range(2, len(values) + 2))


def test_a_row_knows_the_line_it_starts_on():
    text = 'text,label\r\n"two\nlines",a\r\n\r\n"x ""q"" y",b\r\n'
    _, rows, lines = read_delimited("x.csv", text, SPEC)
    assert rows == [["two\nlines", "a"], ['x "q" y', "b"]]
    assert lines == [2, 5]


def test_fields_above_the_limit_of_the_csv_module(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "long.csv"
    path.write_text("text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read_table(str(path), SPEC).columns["text"][0]) == 200_000
    assert csv.field_size_limit() == before


ROWS = [{"text": 'a "b", c\n', "label": "x"}, {"text": "ünïcode 😀", "label": "y"}]


def _jsonl(path):
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


def _json(path):
    path.write_text(json.dumps(ROWS))


def _columns(path):
    path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))


def _parquet(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def _bom(path):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *(row.values() for row in ROWS)])
    path.write_bytes(out.getvalue().encode("utf-8-sig"))


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", _jsonl), ("a.json", _json), ("b.json", _columns),
                                             ("a.parquet", _parquet), ("a.csv", _bom)])
def test_every_format_gives_the_same_table(tmp_path, name, write):
    write(tmp_path / name)
    table = read_table(str(tmp_path / name), SPEC)
    assert table.columns == {key: [row[key] for row in ROWS] for key in ROWS[0]}


def test_paragraphs_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  \nthree\n")
    table = read_table(str(tmp_path / "a.txt"), SPEC)
    assert table.columns == {"text": ["one\ntwo", "three"]}
    assert table.numbers == [1, 5]


def test_a_file_without_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text("1\tgood\n0\tbad\n")
    spec = DataSpec(task="classification", train="a.tsv", header=False, columns=("label", "text"))
    assert read_table(str(tmp_path / "a.tsv"), spec).columns == {"label": ["1", "0"], "text": ["good", "bad"]}


DAMAGED = {
    "empty.csv": (b"", "the file has no rows"),
    "header.csv": (b"text,label\n", "the file has no rows"),
    "latin.csv": ("text,label\nfine,a\ncaf\u00e9,b\n".encode("latin-1"), "line 3: byte 21 (0xe9) is not utf-8"),
    "utf16.csv": ("text,label\nfine,a\n".encode("utf-16"), "line 1: byte 0 (0xff) is not utf-8"),
    "short.csv": (b"text,label\nfine,a\nbad\n", "line 3: 1 fields, but there are 2 columns"),
    "long.csv": (b"text,label\nyes, it is,a\n", "line 2: 3 fields"),
    "long.tsv": (b"text\tlabel\nfine\ta\tb\n", "line 2: 3 fields"),
    "open.csv": (b'text,label\n"fine,a\nbad,b\n', "starts on line 2 is not well quoted"),
    "junk.csv": (b'text,label\n"fine"x,a\n', "starts on line 2 is not well quoted"),
    "twice.csv": (b"text,text\nfine,a\n", "columns named twice: text"),
    "column.csv": (b"Text,label\nfine,a\nbad,b\n", "no column 'text' (data.text)"),
    "nolabel.csv": (b"text,lable\nfine,a\n", "no column 'label' (data.label)"),
    "blank.csv": (b"text,label\nfine,a\n ,b\n,a\n", "2 of 3 rows are empty in column 'text' (line 3, 4)"),
    "unlabelled.csv": (b"text,label\nfine,a\nbad,\n", "line 3, column 'label': the label is empty"),
    "one.csv": (b"text,label\nfine,a\nbad,a\n", "every row has the label 'a'"),
    "broken.jsonl": (b'{"text": "a", "label": 1}\n{"text": "b"\n', "line 2: not JSON"),
    "list.jsonl": (b'{"text": "a", "label": 1}\n["b", 2]\n', "line 2: holds a list; an object is expected"),
    "lack.jsonl": (b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: no value in column 'label'"),
    "null.jsonl": (b'{"text": null, "label": 1}\n{"text": "b", "label": 2}\n', "line 1: no value in column 'text'"),
    "number.jsonl": (b'{"text": 5, "label": 1}\n{"text": "b", "label": 2}\n', "line 1, column 'text': 5 is not text"),
    "surrogate.jsonl": (b'{"text": "\\ud800", "label": 1}\n{"text": "b", "label": 2}\n',
                        "line 1, column 'text': character 0 is half"),
    "object.jsonl": (b'{"text": "a", "label": {"x": 1}}\n', "line 1, column 'label': {'x': 1} is not a label"),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', "line 1, column 'label': nan is not a label"),
    "deep.json": (b"[" * 100_000, "not readable as JSON"),
    "digits.json": (b"[" + b"9" * 10_000 + b"]", "not readable as JSON"),
    "scalar.json": (b"3", "holds a number; a table is expected"),
    "tree.json": (b'{"train": [1, 2], "test": [1]}', "its columns differ in length: train=2 test=1"),
    "nested.json": (b'{"a": {"b": 1}}', "holds an object; a table is expected"),
    "rows.json": (b'[{"text": "a", "label": 1}, 7]', "row 2: holds a number"),
    "text.parquet": (b"text,label\nfine,a\n", "not readable as parquet"),
    "magic.parquet": (b"PAR1" + b"\0" * 64 + b"PAR1", "not readable as parquet"),
    "data.xlsx": (b"PK", "files of kind '.xlsx' cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, words, name):
    from slimtune.data import prepare

    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    spec = DataSpec(task="classification", train=str(tmp_path / name), validation_fraction=0)
    with pytest.raises(DataError) as caught:
        prepare(spec, words)
    assert message in str(caught.value)
    assert name in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"]))
def test_any_bytes_are_a_table_or_a_data_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        table = read_table(str(path), SPEC)
    except DataError:
        return
    assert len({len(values) for values in table.columns.values()} | {len(table)}) == 1


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"no such file\.\n  The folder has: train\.csv\n  Nearest: train\.csv"):
        read_table(str(tmp_path / "trian.csv"), SPEC)
    with pytest.raises(DataError, match="does not exist either"):
        read_table(str(tmp_path / "no" / "train.csv"), SPEC)
    with pytest.raises(DataError, match=r"is a folder, not a file\.\n  It has: train\.csv"):
        read_table(str(tmp_path), SPEC)


def test_a_wrong_column_gets_a_suggestion(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,label\nfine,a\n")
    table = read_table(str(tmp_path / "a.csv"), SPEC)
    with pytest.raises(DataError, match=r"It has: sentence label\n  Did you mean 'sentence'\?"):
        texts(table, "sentense", "text")


@pytest.mark.parametrize(("value", "message"), [("high", "line 3, column 'label': 'high' is not a number"),
                                                ("nan", "line 3, column 'label': 'nan' is not a finite number"),
                                                ("1e999", "'1e999' is not a finite number"),
                                                ("", "'' is not a number")])
def test_a_regression_label_that_is_no_number(tmp_path, value, message):
    (tmp_path / "a.csv").write_text(f"text,label\nfine,1.5\nbad,{value}\n")
    with pytest.raises(DataError, match=message):
        numbers(read_table(str(tmp_path / "a.csv"), SPEC), "label")


def test_empty_texts_can_be_allowed(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nfine,a\n,b\n")
    assert texts(read_table(str(tmp_path / "a.csv"), SPEC), "text", "text", allow_empty=True) == ["fine", ""]


def test_other_encodings_can_be_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncaf\u00e9,a\n".encode("cp1252"))
    read = [read_table(str(tmp_path / "a.csv"), SPEC.model_copy(update={"encoding": e})) for e in ("cp1252", "latin-1")]
    assert [table.columns["text"] for table in read] == [["caf\u00e9"]] * 2
    with pytest.raises(DataError, match="no such encoding 'utf8000'"):
        read_table(str(tmp_path / "a.csv"), SPEC.model_copy(update={"encoding": "utf8000"}))


@settings(deadline=None)
@given(st.sets(st.integers(-50, 50), min_size=1))
def test_integer_labels_are_ordered_by_value(values):
    assert order_of({str(value) for value in values}) == tuple(str(value) for value in sorted(values))


def test_sets_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label,
                                  "tags": datasets.Sequence(label)})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[1], [0, 1], []]},
                                      features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    table = read_dataset(str(tmp_path / "saved"), "train")
    assert table.columns == {"text": ["a", "b", "c"], "label": ["pos", "neg", None],
                             "tags": [["pos"], ["neg", "pos"], []]}
    with pytest.raises(DataError, match="`datasets` cannot read it"):
        read_dataset(str(tmp_path / "saved"), "test")
    with pytest.raises(DataError, match="`datasets` cannot read it"):
        read_dataset(str(tmp_path / "none"), "train")


def test_a_folder_of_files_through_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "set"
    home.mkdir()
    (home / "train.csv").write_text("text,label\ngood,1\nbad,0\n")
    (home / "test.csv").write_text("text,label\nfine,1\n")
    spec = DataSpec(task="classification", source="datasets", dataset=str(home), test="test", validation_fraction=0)
    splits = read_splits(spec)
    assert splits.train is not None
    assert splits.train.columns == {"text": ["good", "bad"], "label": [1, 0]}
    assert splits.test is not None
    assert splits.test.columns["text"] == ["fine"]
    one = DataSpec(task="classification", source="datasets", train=f"{home}:test", validation_fraction=0)
    assert len(read_splits(one).train or []) == 1
