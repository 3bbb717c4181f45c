"""A check of records as they were read, column by column: what no form takes, and characters that tell of damage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import final

from lorafit.errors import DataError
from lorafit.training.datacheck_findings import Findings, Level
from lorafit.training.formats import Record
from lorafit.training.roles import Form
from lorafit.training.sources import Source

# C0 and C1 without tab, line feed and carriage return.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_REPLACED = "\ufffd"
_BOM = "\ufeff"
# UTF-8 that was read as Windows-1252: "Ã©" for "é", "â€™" for an apostrophe.
_GARBLED = re.compile("Ã[\x80-\xbf\u0152-\u2122©ª«¬®¯°±²³´µ¶·¸¹º»¼½¾¿¡¢£¤¥¦§¨]|â€[\u0090-\u2122œž¦™˜“”]")


@final
class Sieve:
    """Lets through what can be read, and notes the rest; one file after the other.

    Args:
        findings: where to note.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def __call__(self, source: Source, form: Form) -> Source:
        """`source` without the records that `form` refuses; `source` itself if it refuses all of them.

        What is wrong with all records is left to `forms.examples`, which raises it.
        """
        refused: list[tuple[DataError, Record]] = []
        kept: list[Record] = []
        for record in source.records:
            try:
                form.example(record)
            except DataError as error:
                refused.append((error, record))
            else:
                kept.append(record)
        if not kept:
            return source
        for why, record in refused:
            self._refused(why, record, form)
        self._characters(kept, form)
        self._columns(kept, form)
        return replace(source, records=kept) if refused else source

    def _refused(self, error: DataError, record: Record, form: Form) -> None:
        self._findings.add(
            Level.ERROR,
            "unreadable",
            error.message,
            str(error.where or record.where),
            fix=error.fix or "mend the record, or leave it out",
            field=_field(error, form),
            found=str(error.found or ""),
        )

    def _characters(self, records: list[Record], form: Form) -> None:
        for record in records:
            for role, column in form.columns.items():
                for text in _strings(record.fields.get(column)):
                    self._string(text, record, column, labels=role == "label")

    def _string(self, text: str, record: Record, column: str, *, labels: bool) -> None:
        def found(level: Level, name: str, said: str, fix: str) -> None:
            self._findings.add(level, name, said, record.where, field=column, fix=fix, found=_around(text, name))

        if labels and text != text.strip():
            found(
                Level.ERROR, "label-spaces", "The label has spaces around it, which makes it another class.", "strip it"
            )
        if _CONTROL.search(text):
            said = "The text holds control characters."
            found(Level.WARNING, "control-characters", said, "remove them, or write the file anew from its source")
        if text.isascii():
            return
        if _REPLACED in text:
            said = "The text holds replacement characters (U+FFFD): it was decoded wrongly once."
            found(Level.WARNING, "replacement-characters", said, "write the file anew from its source, as UTF-8")
        if _BOM in text:
            said = "The text holds a byte order mark (U+FEFF)."
            found(Level.WARNING, "byte-order-mark", said, "remove it: read the source with encoding='utf-8-sig'")
        if _GARBLED.search(text):
            said = "The text looks like UTF-8 that was read as Windows-1252."
            found(Level.WARNING, "garbled", said, "undo it: text.encode('cp1252').decode('utf-8')")

    def _columns(self, records: list[Record], form: Form) -> None:
        """Optional columns that say nothing in any record."""
        for role, column in form.columns.items():
            if role in ("system", "input") and not any(record.fields.get(column) for record in records):
                self._findings.add(
                    Level.NOTE,
                    "empty-column",
                    "The column is empty in all records.",
                    records[0].where,
                    field=column,
                    fix="remove it, or fill it in",
                    count=len(records),
                )


def _field(error: DataError, form: Form) -> str:
    """The column that an error is about: the one that it names, or that of the turns."""
    named = (column for column in form.columns.values() if repr(column) in error.message)
    return next(named, form.columns.get("messages", ""))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            if isinstance(turn, dict):
                yield from (part for part in turn.values() if isinstance(part, str))


_MARKS = {"replacement-characters": _REPLACED, "byte-order-mark": _BOM}


def _around(text: str, name: str) -> str:
    """A piece of the text with what was found in the middle, escaped."""
    pattern = {"control-characters": _CONTROL, "garbled": _GARBLED}.get(name)
    matched = pattern.search(text) if pattern is not None else None
    place = matched.start() if matched is not None else max(0, text.find(_MARKS.get(name, "\0")))
    piece = text[max(0, place - 15) : place + 15]
    return ascii(piece) if name in ("control-characters", *_MARKS) else repr(piece)
