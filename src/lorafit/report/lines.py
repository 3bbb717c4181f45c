"""The lines of a records file: bytes to JSON objects to checked values, every error naming file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lorafit.errors import DataError, nearest, some

_Value = TypeVar("_Value")

MEND = "restore the file from a copy, or delete that line if what it recorded may be missing from the report"


@dataclass(frozen=True)
class Line:
    """One record and where it stands.

    Attributes:
        where: `file:line`.
        fields: the JSON object.
    """

    where: str
    fields: Mapping[str, Any]

    def text(self, key: str) -> str | None:
        """The text under `key`; None when it is null or missing."""
        return self._value(key, str, "text")

    def flag(self, key: str) -> bool:
        """Whether `key` is true; false when it is null or missing."""
        return self._value(key, bool, "true or false") or False

    def mapping(self, key: str) -> Mapping[str, Any]:
        """The object under `key`; empty when it is null or missing."""
        return self._value(key, dict, "an object") or {}

    def part(self, key: str) -> Line | None:
        """The object under `key`, to be read as a line is; None when it is null or missing."""
        value = self._value(key, dict, "an object")
        return None if value is None else self._inside(key, value)

    def parts(self, key: str) -> tuple[Line, ...]:
        """The objects in the list under `key`; empty when it is null or missing."""
        values = self._value(key, list, "a list of objects") or []
        if not all(isinstance(value, dict) for value in values):
            raise self._wrong(key, "a list of objects or null")
        return tuple(self._inside(f"{key}.{at}", value) for at, value in enumerate(values))

    def _inside(self, key: str, fields: Mapping[str, Any]) -> Line:
        return Line(f"{self.where}, {key}", {"event": self.fields.get("event"), **fields})

    def number(self, key: str) -> float | None:
        """The number under `key`; None when it is null (as a number that was not finite is) or missing."""
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        raise self._wrong(key, "a finite number or null")

    def count(self, key: str) -> int | None:
        """The whole number, zero or more, under `key`; None when it is null or missing."""
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise self._wrong(key, "a whole number, zero or more")

    def moment(self, key: str) -> datetime | None:
        """The ISO-8601 time under `key`; None when it is null or missing."""
        value = self.text(key)
        if value is None:
            return None
        try:
            # Python 3.10 does not know the suffix Z.
            return datetime.fromisoformat(value.removesuffix("Z") + "+00:00" * value.endswith("Z"))
        except ValueError:
            raise self._wrong(key, "a time as ISO-8601 has it") from None

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts in the list under `key`; empty when it is null or missing."""
        values = self._value(key, list, "a list of texts") or []
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of texts or null")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """The whole numbers, zero or more, in the list under `key`; empty when it is null or missing."""
        values = self._value(key, list, "a list of whole numbers") or []
        if not all(type(value) is int and value >= 0 for value in values):
            raise self._wrong(key, "a list of whole numbers, zero or more, or null")
        return tuple(values)

    def measured(self, key: str) -> Mapping[str, float | None]:
        """The object of numbers, or nulls for those that were not finite, under `key`; empty when null or missing."""
        values = self.mapping(key)
        known = [value for value in values.values() if value is not None]
        if not all(type(value) in (int, float) and abs(value) < math.inf for value in known):
            raise self._wrong(key, "an object of finite numbers and nulls, or null")
        return values

    def counts(self, key: str) -> Mapping[str, int]:
        """The object of whole numbers, zero or more, under `key`; empty when it is null or missing."""
        values = self.mapping(key)
        if not all(type(value) is int and value >= 0 for value in values.values()):
            raise self._wrong(key, "an object of whole numbers, zero or more, or null")
        return values

    def choice(self, key: str, names: Iterable[str]) -> str:
        """The text under `key`, which must be there and one of `names`."""
        allowed = tuple(names)
        value = self.needed(key, self.text)
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}", near=nearest(value, allowed))
        return value

    def needed(self, key: str, read: Callable[[str], _Value | None]) -> _Value:
        """What `read` finds under `key`, which must be there and not null."""
        value = read(key)
        if value is None:
            near = () if key in self.fields else nearest(key, self.fields)
            raise self._wrong(key, "a value", near=near)
        return value

    def _value(self, key: str, kind: type[_Value], expected: str) -> _Value | None:
        value = self.fields.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise self._wrong(key, f"{expected} or null")

    def _wrong(self, key: str, expected: str, near: Iterable[str] = ()) -> DataError:
        if key in self.fields:
            found = _short(json.dumps(self.fields[key]))
        else:
            found = f"no such key among {some(self.fields, limit=12)}"
        return DataError(
            f"a record of event {self.fields.get('event')!r} is damaged",
            where=f"{self.where}, key {key!r}",
            found=found,
            expected=expected,
            near=near,
            fix=MEND,
        )


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """The records of the file, in its order, and remarks on lines that a kill left half-written.

    Two kinds of broken lines are no damage, since the recorder leaves them when it is killed while writing:
    the last one when no newline ends it, and one whose successor carries `"repaired": true`. They are left
    out and remarked on.

    Raises:
        DataError: the file cannot be read, holds no record, or has a line that is not a JSON object.
    """
    content = _content(path)
    rows = content.split(b"\n")
    lines: list[Line] = []
    remarks: list[str] = []
    broken: DataError | None = None
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = _object(row, where)
        except DataError as error:
            if broken is not None:
                raise broken from None
            broken = error
            continue
        if broken is not None:
            if fields.get("repaired") is not True:
                raise broken
            remarks.append(_half(broken))
            broken = None
        lines.append(Line(where, fields))
    if broken is not None:
        if not rows[-1].strip() or not lines:
            raise broken
        remarks.append(_half(broken))
    if not lines:
        raise DataError(
            "the file holds no record",
            where=f"{path}:1",
            found="an empty file" if not content else "only blank lines",
            expected="one JSON object a line, the first with the event 'run'",
            fix="give the records.jsonl of a run that has begun",
        )
    return lines, remarks


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        inside = path / "records.jsonl"
        fix = f"give {inside}" if inside.is_file() else "give the path of a run's records.jsonl"
        raise DataError(
            "the records file cannot be read", where=path, found=error.strerror or error, fix=fix
        ) from error


def _object(row: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(row.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(
            f"a line of the records file is not JSON: {error}",
            where=where,
            found=_short(row.decode("utf-8", "backslashreplace")),
            expected="one JSON object in UTF-8",
            fix=MEND,
        ) from None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise DataError(
            "a line of the records file is not a record",
            where=where,
            found=_short(row.decode()),
            expected='a JSON object with the key "event"',
            fix=MEND,
        )
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _half(error: DataError) -> str:
    return f"{error.where} is half-written, as a kill leaves it, and was skipped."


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
