"""Bytes on disk to text: gzip, byte order marks, encodings, and files that are not text at all.

Knows nothing about records. Everything here fails with the file, the line and the byte.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lorafit.errors import DataError

# The first bytes of files that people hand over by mistake.
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed data", "add .gz to its name"),
    (b"PK\x03\x04", "a ZIP archive (also .xlsx, .docx and .pt)", "unpack it, or export the sheet as CSV"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"ARROW1", "Arrow", 'write it with Dataset.to_json("data.jsonl")'),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed data", "unpack it with `zstd -d`"),
    (b"BZh", "bzip2-compressed data", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ", "xz-compressed data", "unpack it with `unxz`"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF document", "extract its text first"),
    (b"GGUF", "a GGUF model", "name the data, not the model"),
    (b"\x89PNG", "a PNG image", "name a text file"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_BOM = b"\xef\xbb\xbf"


def read_text(path: Path, name: str) -> str:
    """The text of a UTF-8 file, gunzipped if its name ends in `.gz`, without its byte order mark.

    Args:
        path: the file.
        name: what messages call it.

    Raises:
        DataError: the file cannot be opened, is empty, is binary, or is not UTF-8.
    """
    data = _read_bytes(path, name)
    bom = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    if not data[bom:].strip():
        raise DataError(
            "The file is empty.",
            where=name,
            found=f"{len(data)} bytes",
            expected="at least one record",
            fix="name another file, or write records into this one",
        )
    if data.startswith(_UTF16):
        raise DataError(
            "The file is UTF-16, not UTF-8.",
            where=name,
            found=f"the byte order mark {data[:2].hex(' ')} at offset 0",
            expected="UTF-8 text",
            fix="save it as UTF-8, or convert it with `iconv -f UTF-16 -t UTF-8`",
        )
    try:
        text = data[bom:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(data, bom + error.start, error.reason, path, name) from None
    if "\0" in text:
        raise _not_text(data, data.index(b"\0"), "no character of a text", path, name)
    return text


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            "The file cannot be read.", where=name, found=error.strerror, fix="check its permissions"
        ) from error
    if path.suffix.lower() != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "The file is named .gz but cannot be gunzipped.",
            where=name,
            found=str(error),
            expected="a whole gzip file",
            fix="fetch it again, or take .gz off its name if it is plain text",
        ) from error


def _not_text(data: bytes, offset: int, reason: str, path: Path, name: str) -> DataError:
    """The error for the first byte that is not UTF-8 text, at `offset`."""
    for magic, found, fix in _MAGIC:
        if data.startswith(magic):
            return DataError("The file is not text.", where=name, found=found, expected="UTF-8 text", fix=fix)
    binary = b"\0" in data
    return DataError(
        "The file is not text." if binary else "The file is not UTF-8 text.",
        where=f"{name}:{_line(data, offset)}",
        found=f"byte 0x{data[offset]:02x} at offset {offset} ({reason})",
        expected="UTF-8 text",
        fix="name a JSON Lines, JSON, CSV, TSV, Parquet or text file"
        if binary
        else f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > converted{path.suffix}",
    )


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1
