"""Files to records, and what is said of files that are none."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.errors import DataError
from lorafit.training import sources
from lorafit.training.sources import read_records

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}]


def fields(source):
    return [record.fields for record in source.records]


def places(source):
    return [record.where.rpartition("/")[2] for record in source.records]


def refused(source, **settings) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(source, **settings)
    assert caught.value.fix, "every error names a fix"
    return caught.value


def test_json_lines(write):
    source = read_records(write("data.jsonl", ROWS))
    assert fields(source) == ROWS
    assert places(source) == ["data.jsonl:1", "data.jsonl:2"]
    assert (source.format, source.name, source.note) == ("JSON Lines", "data.jsonl", "")


def test_blank_lines_crlf_and_byte_order_mark(write):
    text = '\r\n{"text": "a\u2028b"}\r\n\r\n  \r\n{"text": "c"}'
    source = read_records(write("data.jsonl", b"\xef\xbb\xbf" + text.encode()))
    assert fields(source) == [{"text": "a\u2028b"}, {"text": "c"}]
    assert places(source) == ["data.jsonl:2", "data.jsonl:5"]


def test_gzip(write):
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    source = read_records(write("data.jsonl.gz", packed))
    assert fields(source) == ROWS
    assert places(source) == ["data.jsonl.gz:1", "data.jsonl.gz:2"]
    assert "gzip" in refused(write("broken.jsonl.gz", packed[:-9])).expected


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"v": 1, "s": "[", "data": rows, "z": {}}])
def test_json_knows_its_lines(write, wrap):
    source = read_records(write("data.json", wrap(ROWS)))
    assert fields(source) == ROWS
    lines = Path(write("data.json", wrap(ROWS))).read_text().split("\n")
    assert places(source) == [
        f"data.json:{line}"
        for line, text in enumerate(lines, start=1)
        if text.strip() == "{" and line > 1 and "prompt" in lines[line]
    ]


def test_json_lines_in_a_json_file(write):
    source = read_records(write("data.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert places(source) == ["data.json:1", "data.json:2"]
    assert source.format == "JSON Lines (in a .json file)"


def test_json_without_one_list(write):
    assert "'a', 'b' are lists" in refused(write("two.json", {"a": [], "b": [{}]})).found
    assert "keys 'prompt'" in refused(write("one.json", {"prompt": "x"})).found
    assert refused(write("text.json", '"x"')).found == "a string"
    assert refused(write("none.json", "[]")).message == "There are no records."


@pytest.mark.parametrize(
    ("line", "found", "fix"),
    [
        ('{"a": 1},', "Extra data", "comma"),
        ("{'a': 1}", "double quotes", "double quotes"),
        ('{"a": "x\ty"}', "Invalid control character", r"\n and \t"),
        ("{", "Expecting property name", "rename the file to .json"),
        ('[{"a": 1}, {"a"}]', "Expecting ':'", "rename the file to .json"),
        ('{"a": 1', "(end)", "JSON library"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice", "once"),
        ("[" * 100_000, "nested too deeply", "plain"),
        ("[1, 2]", "a list: [1, 2]", "name the values"),
        ('"text"', 'a string: "text"', "name the values"),
        ("null", "null", "name the values"),
    ],
)
def test_broken_json_says_line_and_column(write, line, found, fix):
    error = refused(write("data.jsonl", '{"a": 0}\n\n' + line + "\n"))
    assert "data.jsonl:3" in str(error.where)
    assert found in str(error.found)
    assert fix in str(error.fix)


def test_broken_json_file_says_line_and_column(write):
    error = refused(write("data.json", '[{"a": 1},\n {"a": }]'))
    assert str(error.where).endswith("data.json:2 column 8")
    assert ">>>" in error.found
    assert refused(write("twice.json", '[{"a": 1, "a": 2}]')).found == "the key 'a' twice in one object"


def test_csv(write):
    text = 'prompt,completion\r\n"a, b","line 1\nline 2"\r\n\r\nc,"say ""hi"""\r\n'
    source = read_records(write("data.csv", b"\xef\xbb\xbf" + text.encode()))
    assert fields(source) == [
        {"prompt": "a, b", "completion": "line 1\nline 2"},
        {"prompt": "c", "completion": 'say "hi"'},
    ]
    assert places(source) == ["data.csv:2", "data.csv:5"]
    assert source.format == "CSV"


def test_tsv(write):
    source = read_records(write("data.tsv", "text\tlabel\na, b\tyes\n"))
    assert fields(source) == [{"text": "a, b", "label": "yes"}]
    assert source.format == "TSV"


@pytest.mark.parametrize(
    ("text", "where", "found", "fix"),
    [
        ("a,b,a\n1,2,3\n", "data.csv:1", "'a'", "rename"),
        ("a,,b\n1,2,3\n", "data.csv:1", "a,,b", "index=False"),
        ("a,b\n1,2\n3,4,5\n", "data.csv:3", "3 values: 3,4,5", "double quotes"),
        ("a,b\n1,2\n3\n", "data.csv:3", "1 values: 3", "double quotes"),
        ("question;answer\nx;y\n", "data.csv:1", "'question;answer'", ".tsv"),
        ("a\tb\nx\ty\n", "data.csv:1", "'a\\tb'", ".tsv"),
        ("a,b\n", "data.csv:1", "a, b", "header"),
        ('a,b\n1,2\n"3,4\n5,6\n', "data.csv:3", "unexpected end of data", "CSV library"),
        ('a,b\n"1"x,2\n', "data.csv:2", "expected after", "CSV library"),
    ],
)
def test_broken_csv_says_the_line(write, text, where, found, fix):
    error = refused(write("data.csv", text))
    assert str(error.where).endswith(where)
    assert found in str(error.found)
    assert fix in str(error.fix)


def test_text_is_paragraphs(write):
    source = read_records(write("data.txt", "\nfirst\r\nstill first\r\n \r\n\r\nsecond"))
    assert fields(source) == [{"text": "first\nstill first"}, {"text": "second"}]
    assert places(source) == ["data.txt:2", "data.txt:6"]
    assert source.format == "text (paragraphs between blank lines)"


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    # A folder that looks like a partition must not become a column.
    (tmp_path / "a=1").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a=1" / "data.parquet")
    source = read_records(tmp_path / "a=1" / "data.parquet")
    assert fields(source) == rows
    assert places(source) == ["data.parquet: row 1", "data.parquet: row 2"]


def test_parquet_that_is_none(write):
    error = refused(write("data.parquet", "prompt,completion\n"))
    assert error.message == "The file is not Parquet."


@pytest.mark.parametrize("content", ["", " \n\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.txt"])
def test_empty_file(write, name, content):
    error = refused(write(name, content))
    assert error.message == "The file is empty."
    assert str(error.where).endswith(name)


def test_not_utf8_says_line_and_byte(write):
    error = refused(write("data.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n'))
    assert str(error.where).endswith("data.jsonl:2")
    assert error.found.startswith("byte 0xe9 at offset 19 ")
    assert error.expected == "UTF-8 text"
    assert "iconv" in error.fix


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x1f\x8b\x08rest", "gzip-compressed data"),
        (b"PK\x03\x04\0\0", "a ZIP archive (also .xlsx, .docx and .pt)"),
        (b"a line\nzero\0byte", "byte 0x00 at offset 11 (no character of a text)"),
        ('{"a": 1}\n'.encode("utf-16"), "the byte order mark ff fe at offset 0"),
    ],
)
def test_binary_file(write, content, found):
    error = refused(write("data.csv", content))
    assert error.found == found
    assert error.expected == "UTF-8 text"


def test_a_text_that_begins_like_a_binary_is_a_text(write):
    assert fields(read_records(write("data.txt", "GGUF is a file format."))) == [{"text": "GGUF is a file format."}]


def test_unknown_format(write):
    error = refused(write("data.jsonlines", "{}"))
    assert error.message == "The format of the file is unknown."
    assert error.found == "the suffix '.jsonlines'"
    assert ".jsonl" in error.near
    assert refused(write("data", "{}")).found == "a name without a suffix"


def test_misspelt_path_names_its_neighbours(write, tmp_path, monkeypatch):
    write("sets/train_data.jsonl", ROWS)
    right = str(tmp_path / "sets" / "train_data.jsonl")
    for wrong in ("sets/train_dta.jsonl", "sets/train-data.json", "stes/train_data.jsonl"):
        error = refused(str(tmp_path / wrong))
        assert error.message == "There is no such file or directory."
        assert error.near in ((right,), (str(tmp_path / "sets"),))
        assert error.fix == f"did you mean {error.near[0]}?"
    monkeypatch.chdir(tmp_path)
    for wrong in ("sets/train_data", "Sets/x", "set", "SETS"):
        assert refused(wrong, hub=no_hub).near, wrong
    error = refused("nothing.jsonl", hub=no_hub)
    assert "'.' holds sets" in error.found


def no_hub(name, config, split):
    raise AssertionError("the hub must not be asked")


def test_directory(write, tmp_path):
    write("set/b.jsonl", ROWS[1:])
    write("set/a.jsonl", ROWS[:1])
    write("set/README.md", "About these data.")
    write("set/.hidden.csv", "a\n1\n")
    write("set/more/c.jsonl", ROWS)
    source = read_records(tmp_path / "set")
    assert fields(source) == ROWS
    assert places(source) == ["a.jsonl:1", "b.jsonl:1"]
    assert source.format == "JSON Lines, 2 files"
    assert source.note == "left out of the directory: README.md, more"


def test_directory_with_splits(write, tmp_path):
    write("set/train.jsonl", ROWS[:1])
    write("set/valid.jsonl", ROWS[1:])
    write("set/extra.jsonl", ROWS)
    train, valid = read_records(tmp_path / "set"), read_records(tmp_path / "set", split="validation")
    assert (fields(train), fields(valid)) == (ROWS[:1], ROWS[1:])
    assert train.note == "left out of the directory: extra.jsonl, valid.jsonl"
    error = refused(tmp_path / "set", split="test")
    assert error.near == ("train", "validation")


def test_directory_without_data(write, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").found == "nothing"
    write("set/model.safetensors", b"\0")
    write("set/data/x.jsonl", ROWS)
    error = refused(tmp_path / "set")
    assert error.message == "The directory holds no data."
    assert error.found == "data/, model.safetensors"
    assert error.near == (str(tmp_path / "set" / "data"),)


def test_directory_of_several_formats(write, tmp_path):
    write("set/a.jsonl", ROWS)
    write("set/b.csv", "prompt,completion\na,b\n")
    assert refused(tmp_path / "set").found == "b.csv (CSV), a.jsonl (JSON Lines)"


def test_a_file_has_no_splits(write):
    assert refused(write("data.jsonl", ROWS), split="test").found == "the split 'test'"


def test_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return iter(ROWS)

    source = read_records("some-owner/some_set:main", hub=hub)
    assert fields(source) == ROWS
    assert source.records[1].where == "some-owner/some_set:main[train] row 2"
    read_records("imdb", split="test", hub=hub)
    assert asked == [("some-owner/some_set", "main", "train"), ("imdb", None, "test")]


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def hub(name, config, split):
        raise ConnectionError("offline mode is enabled\nmore")

    error = refused("owner/set", hub=hub)
    assert error.where == "owner/set[train]"
    assert error.found == "ConnectionError: offline mode is enabled"
    assert "name the file" in error.fix


@pytest.mark.parametrize("name", ["owner/set.jsonl", "./owner/set", "a/b/c", "../set", "a b", "here/set"])
def test_what_is_no_hub_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert refused(name, hub=no_hub).message == "There is no such file or directory."


def test_hub_class_labels_come_as_names(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: made)
    assert [row["label"] for row in sources.load_hub("x", None, "train")] == ["pos", "neg", -1]


def test_reading_imports_neither_torch_nor_transformers(write):
    code = (
        "import sys; from lorafit.training import data\n"
        f"data.load_examples(data.DataSettings(data={write('data.jsonl', ROWS)!r}))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
