"""Files to records, one function per file format.

The local text formats are parsed with the standard library alone, so that every record knows its line and
every error carries `file:line`. Knows nothing about what the columns mean (`forms.py` does).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, MissingExtraError, nearest, some
from lorafit.training.textfile import read_text


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    Attributes:
        fields: column name to value.
        where: `file:line` of its first line, or `file: row N` (from 1) where there are no lines.
    """

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Format:
    """A file format: what it is called, the suffixes it goes by, and how to read it."""

    label: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, str], tuple[str, list[Record]]]


def format_of(path: Path) -> Format | None:
    """The format that the name of `path` stands for, `.gz` aside; None if it is not one of `FORMATS`."""
    return _BY_SUFFIX.get(suffix_of(path))


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, in lower case: `.jsonl` for `Data.JSONL.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_file(path: Path, name: str) -> tuple[str, list[Record]]:
    """The label of the format and the records of one local file.

    Raises:
        DataError: the format is unknown, or the file does not hold what its name says.
    """
    known = format_of(path)
    if known is None:
        suffix = suffix_of(path)
        raise DataError(
            "The format of the file is unknown.",
            where=name,
            found=f"the suffix {suffix!r}" if suffix else "a name without a suffix",
            expected=" ".join(_BY_SUFFIX) + " (also with .gz)",
            near=nearest(suffix, _BY_SUFFIX),
            fix="rename it by what it holds, or convert it to JSON Lines",
        )
    return known.read(path, name)


# JSON -----------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {some(map(repr, twice))} twice in one object")
    return fields


# json keeps the last of two equal keys without a word; a record must not lose a value that way.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json_lines(path: Path, name: str) -> tuple[str, list[Record]]:
    return "JSON Lines", _lines_to_records(read_text(path, name), name)


def _lines_to_records(text: str, name: str) -> list[Record]:
    records = []
    # Not splitlines(): that also splits at U+2028 and its like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\r")
        if not line:
            continue
        where = f"{name}:{number}"
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise DataError(
                "The line is not JSON.",
                where=f"{where} column {error.pos + 1}",
                found=f"{error.msg}: {_around(line, error.pos)}",
                expected="one JSON object on each line",
                fix=_json_fix(line, error),
            ) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(error, where) from None
        records.append(_record(value, where, "one JSON object on each line"))
    return records


def _record(value: object, where: str, expected: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            "The record is not an object.",
            where=where,
            found=f"{_kind(value)}: {_excerpt(json.dumps(value, ensure_ascii=False))}",
            expected=expected,
            fix='name the values, as in {"prompt": "...", "completion": "..."}',
        )
    return Record(value, where)


def _json(path: Path, name: str) -> tuple[str, list[Record]]:
    text = read_text(path, name)
    try:
        whole = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1 and text.lstrip().startswith("{"):
            # Several documents in one file are never JSON, and `Dataset.to_json("x.json")` writes just that.
            return "JSON Lines (in a .json file)", _lines_to_records(text, name)
        raise DataError(
            "The file is not JSON.",
            where=f"{name}:{error.lineno} column {error.colno}",
            found=f"{error.msg}: {_around(text, error.pos)}",
            expected="a list of objects",
            fix=_json_fix(text, error),
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, name) from None
    start = text.index("[") if isinstance(whole, list) else _start_of_list(text, whole, name)
    records = [_record(value, f"{name}:{line}", "a list of objects") for value, line in _elements(text, start)]
    return "JSON", records


def _start_of_list(text: str, whole: object, name: str) -> int:
    """Where the one list value of a top-level object begins."""
    keys = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if not isinstance(whole, dict) or len(keys) != 1:
        held = f"an object with the keys {some(map(repr, whole))}" if isinstance(whole, dict) else _kind(whole)
        raise DataError(
            "The file holds no list of records.",
            where=name,
            found=held + (f", of which {some(map(repr, keys))} are lists" if keys else ""),
            expected='a list of objects, or an object with one such list: {"data": [...]}',
            fix="write one list of objects to the file"
            + (" (pandas: to_json(path, orient='records'))" if keys else ""),
        )
    position = _skip(text, text.index("{") + 1)
    while True:
        key, position = _DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)  # the colon
        if key == keys[0]:
            return position
        position = _DECODER.raw_decode(text, position)[1]
        position = _skip(text, _skip(text, position) + 1)  # the comma


def _elements(text: str, start: int) -> Iterator[tuple[object, int]]:
    """Each element of the (valid) list at `start`, with its line: json itself reports no positions."""
    position, line, counted = _skip(text, start + 1), 1, 0
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        value, position = _DECODER.raw_decode(text, position)
        yield value, line
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int) -> int:
    matched = _SPACE.match(text, position)
    assert matched is not None  # the pattern also matches nothing
    return matched.end()


def _json_fix(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].strip()
    if error.msg == "Extra data" and rest == ",":
        return "take the comma off the end of the line"
    if text.strip() in {"[", "{"} or (text.lstrip().startswith("[") and "\n" not in text):
        return "this looks like one JSON document: rename the file to .json"
    if text[error.pos : error.pos + 1] == "'":
        return "write strings with double quotes (Python: json.dumps, not str)"
    if error.msg.startswith("Invalid control character"):
        return r"write line breaks and tabs inside strings as \n and \t"
    return "write each record with a JSON library (Python: json.dumps)"


def _unreadable(error: Exception, where: str) -> DataError:
    found = "objects nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError("The JSON cannot be read.", where=where, found=found, fix="keep each key once and values plain")


# CSV, TSV -------------------------------------------------------------------


def _csv(path: Path, name: str) -> tuple[str, list[Record]]:
    return "CSV", _table(read_text(path, name), name, ",")


def _tsv(path: Path, name: str) -> tuple[str, list[Record]]:
    return "TSV", _table(read_text(path, name), name, "\t")


def _table(text: str, name: str, delimiter: str) -> list[Record]:
    rows = _rows(text, name, delimiter)
    line, header = next(rows)
    where = f"{name}:{line}"
    _check_header(header, where, delimiter)
    records = []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                "The row does not have the columns of the header.",
                where=f"{name}:{line}",
                found=f"{len(row)} values: {_excerpt(delimiter.join(row))}",
                expected=f"{len(header)}, as in the header: {', '.join(header)}",
                fix='put values that hold the separator or line breaks in double quotes ("a, b")',
            )
        records.append(Record(dict(zip(header, row, strict=True)), f"{name}:{line}"))
    if not records:
        raise DataError(
            "The file has a header and no rows.",
            where=where,
            found=", ".join(header),
            expected="at least one row",
            fix="add rows; if this line is a record, put a header above it (prompt,completion)",
        )
    return records


def _rows(text: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                "The row cannot be read.",
                where=f"{name}:{line}",
                found=str(error),
                expected='quotes in pairs; a quote inside a quoted value doubled: "say ""hi"""',
                fix="write the file with a CSV library, or as JSON Lines",
            ) from None
        if row:
            yield line, row


def _check_header(header: list[str], where: str, delimiter: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(
            "The header names a column twice.",
            where=where,
            found=some(map(repr, twice)),
            expected="each column once",
            fix="rename or remove one of them",
        )
    if any(not column.strip() for column in header):
        raise DataError(
            "The header has a column without a name.",
            where=where,
            found=delimiter.join(header),
            expected="a name for each column",
            fix="name it, or remove the column (pandas: to_csv(path, index=False))",
        )
    other = "\t" if delimiter == "," else ","
    if len(header) == 1 and any(mark in header[0] for mark in (other, ";", "|")):
        raise DataError(
            "The header is one column that holds another separator.",
            where=where,
            found=repr(header[0]),
            expected="columns separated by " + ("commas" if delimiter == "," else "tabs"),
            fix="name a file with tabs .tsv and one with commas .csv; save one with semicolons or bars anew",
        )


# Text -----------------------------------------------------------------------


def _paragraphs(path: Path, name: str) -> tuple[str, list[Record]]:
    """Records are paragraphs: runs of lines that are not blank."""
    records: list[Record] = []
    paragraph: list[str] = []
    first = 0
    for number, line in enumerate([*read_text(path, name).split("\n"), ""], start=1):
        line = line.rstrip("\r")
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            records.append(Record({"text": "\n".join(paragraph)}, f"{name}:{first}"))
            paragraph = []
    return "text (paragraphs between blank lines)", records


# Parquet --------------------------------------------------------------------


def _parquet(path: Path, name: str) -> tuple[str, list[Record]]:
    try:
        from pyarrow import parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        raise MissingExtraError("Parquet needs pyarrow.", where=name, fix="pip install 'lorafit[train]'") from error
    try:
        # ParquetFile, not read_table: that reads a folder named key=value above the file as a column.
        with parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            "The file is not Parquet.",
            where=name,
            found=str(error).strip().split("\n")[0],
            expected="a whole Parquet file",
            fix="write it again, or rename it by what it holds",
        ) from error
    return "Parquet", [Record(row, f"{name}: row {number}") for number, row in enumerate(rows, start=1)]


FORMATS = (
    Format("JSON Lines", (".jsonl", ".ndjson"), _json_lines),
    Format("JSON", (".json",), _json),
    Format("CSV", (".csv",), _csv),
    Format("TSV", (".tsv",), _tsv),
    Format("Parquet", (".parquet",), _parquet),
    Format("text", (".txt", ".md"), _paragraphs),
)
_BY_SUFFIX = {suffix: known for known in FORMATS for suffix in known.suffixes}


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _around(text: str, position: int) -> str:
    """The text at `position`, on one line, marked off."""
    before = text[max(0, position - 20) : position].replace("\n", "⏎").replace("\r", "")
    after = text[position : position + 20].replace("\n", "⏎").replace("\r", "")
    return f"{before}>>>{after}" if after else f"{before}>>>(end)"


def _excerpt(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
