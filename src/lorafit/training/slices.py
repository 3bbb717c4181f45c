"""The held-out loss of each slice: of records that have the same value in a column.

It is told from the losses of the held-out records, compared one by one as in `verdict.py`; nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lorafit.errors import DataError, nearest, some
from lorafit.training.findings import Moved, Slice, Slices
from lorafit.training.formats import Record
from lorafit.training.verdict import ERROR, Evaluation, change

NAMES = ("slice", "domain", "source", "category", "dataset", "subset", "topic", "subject", "genre", "language")
"""Columns that tell records apart, where none is named; the first that does is taken."""
MOST = 20
"""Values of such a column, at most: of more it is taken for something else (a file name, an address)."""
MOST_NAMED = 100
"""The same for a column that is named."""
LEAST = 8
"""Records of a slice that is said to have changed: the errors of fewer are not to be trusted."""


@final
@dataclass(frozen=True)
class Slicing:
    """How held-out records are told apart.

    Attributes:
        column: by which column.
        values: where a record was read → its value.
    """

    column: str
    values: Mapping[str, str]


def slicing(records: Sequence[Record], taken: Collection[str], named: str | None) -> Slicing | None:
    """By which column the records can be told apart; None if none was named and none of `NAMES` does.

    Args:
        records: of one source.
        taken: columns that have another role; one that is named may have one (a label).
        named: the column, by the user.

    Raises:
        DataError: a record has no value in the named column, or there are too many values.
    """
    if named is not None:
        values = [_value(record, named) for record in records]
        if any(value is None for value in values):
            raise _unsliced(records[values.index(None)], named)
        found = Slicing(named, {one.where: str(value) for one, value in zip(records, values, strict=True)})
        if len(set(found.values.values())) > MOST_NAMED:
            raise DataError(
                f"the column {named!r} has too many values for a loss of each",
                where=records[0].where,
                found=f"{len(set(found.values.values())):,} values in {len(records):,} records",
                expected=f"at most {MOST_NAMED}",
                fix="name a coarser column as slice, or leave slice away",
            )
        return found
    for name in NAMES:
        values = [_value(record, name) for record in records]
        if name not in taken and None not in values and 2 <= len(set(values)) <= MOST:
            return Slicing(name, {one.where: str(value) for one, value in zip(records, values, strict=True)})
    return None


def _value(record: Record, column: str) -> str | None:
    value = record.fields.get(column)
    if isinstance(value, bool | int) or (isinstance(value, str) and value.strip()):
        return str(value)
    return None


def _unsliced(record: Record, column: str) -> DataError:
    known = column in record.fields
    lacks = "has no text or whole number" if known else "is not there"
    return DataError(
        f"the record is of no slice: the column {column!r} {lacks}",
        where=record.where,
        found=repr(record.fields[column]) if known else "the columns " + some(map(repr, record.fields), 12),
        expected=f"a value in {column!r}",
        near=[near for near in nearest(column, record.fields) if near != column],
        fix="name a column that all records have, or leave slice away",
    )


def counted(found: Slicing, held: Sequence[str]) -> str:
    """How many of the held-out records, given by where they were read, each slice has; as a sentence."""
    counts: dict[str, int] = {}
    for where in held:
        counts[found.values[where]] = counts.get(found.values[where], 0) + 1
    told = some([f"{name} ({count:,})" for name, count in sorted(counts.items())], 12)
    if len(counts) < 2:
        return f"held-out records are all of one {found.column}, {told}: there are no slices to compare"
    return f"held-out loss for each {found.column}: {told}"


def sliced(column: str, names: Sequence[str], before: Evaluation, after: Evaluation) -> Slices | None:
    """What became of each slice; None where there are fewer than two.

    Args:
        column: by which the records are told apart.
        names: the slice of each record.
        before: an evaluation of these records.
        after: another one.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    if len(places) < 2:
        return None
    parts = [_part(name, _some(before, at), _some(after, at), len(places)) for name, at in places.items()]
    parts.sort(key=lambda part: -part.loss.change)
    worse, better = [part for part in parts if part.worse], [part for part in parts if part.better]
    rose = f"{len(worse)} rose: {_named(worse)}" if worse else "none rose, as far as can be told"
    sentence = f"held-out loss by {column}: of {len(parts)} slices {len(better) or 'none'} fell and {rose}"
    if len(better) == len(parts):
        sentence = f"held-out loss by {column}: fell in all {len(parts)} slices, by most in {parts[-1].name}"
        sentence += f" ({parts[-1].loss.changed()}), by least in {parts[0].name} ({parts[0].loss.changed()})"
    hints = tuple(
        f"worse on {column} {part.name} ({part.loss.records:,} records): {part.loss.told()}; look at its records, or "
        "have more of them in the training data"
        for part in worse
    )
    return Slices(column, tuple(parts), sentence, hints)


def _part(name: str, before: Evaluation, after: Evaluation, of: int) -> Slice:
    moved, enough = change(before, after), len(after.counts) >= LEAST
    # Of many slices one seems to move by luck, too: the probability that counts is shared among them.
    worse = enough and 1 - moved.probability() < ERROR / of
    better = enough and moved.probability() < ERROR / of
    return Slice(name, Moved.of(before, after), worse, better)


def _some(one: Evaluation, places: Sequence[int]) -> Evaluation:
    return Evaluation(one.step, tuple(one.losses[at] for at in places), tuple(one.counts[at] for at in places))


def _named(parts: Sequence[Slice]) -> str:
    return some([f"{part.name} ({part.loss.changed()})" for part in parts], 3)
