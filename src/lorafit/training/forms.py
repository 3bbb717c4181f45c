"""What the columns of records mean: the form is recognised by their names, and said aloud.

`SHAPES` is the table of all spellings. Records have a form if they have the required columns of one of its
rows. Of rows of several kinds the first kind wins; two rows of one kind are ambiguous, which is an error. An
explicit mapping `columns` from roles to columns is for data whose columns go by other names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorafit.errors import DataError, nearest, some
from lorafit.training.examples import Example, Labelled
from lorafit.training.formats import Record
from lorafit.training.roles import (
    MESSAGES,
    SHAREGPT,
    Alpaca,
    Chat,
    Dialect,
    Form,
    PromptCompletion,
    Text,
    TextLabel,
)
from lorafit.training.sources import Source

__all__ = [
    "SHAPES",
    "Alpaca",
    "Chat",
    "Form",
    "PromptCompletion",
    "Shape",
    "Text",
    "TextLabel",
    "announcement",
    "examples",
    "label_name",
    "label_names",
    "left_out",
    "recognise",
]


@dataclass(frozen=True)
class Shape:
    """A row of the table: a form, and one spelling of the columns that play its roles."""

    make: Callable[[Mapping[str, str]], Form]
    required: Mapping[str, str]
    optional: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join([*self.required.values(), *(f"[{column}]" for column in self.optional.values())])


def _chat(column: str) -> Shape:
    return Shape(Chat, {"messages": column}, {"system": "system"})


def _alpaca(given: str, output: str) -> Shape:
    required = {"instruction": "instruction", "output": output}
    return Shape(Alpaca, required, {"input": given, "system": "system"})


def _pair(prompt: str, completion: str) -> Shape:
    return Shape(PromptCompletion, {"prompt": prompt, "completion": completion}, {"system": "system"})


def _label(text: str, pair: str | None = None) -> Shape:
    texts = {"text": text} if pair is None else {"text": text, "pair": pair}
    return Shape(TextLabel, {**texts, "label": "label"}, {})


def _document(column: str) -> Shape:
    return Shape(Text, {"text": column}, {})


# Kinds in the order in which they win; the first row of a kind has the canonical names of its roles.
SHAPES: tuple[tuple[Shape, ...], ...] = (
    (_chat("messages"), _chat("conversations"), _chat("conversation")),
    (_alpaca("input", "output"), _alpaca("context", "response")),
    (
        _pair("prompt", "completion"),
        _pair("prompt", "response"),
        _pair("prompt", "answer"),
        _pair("prompt", "output"),
        _pair("question", "answer"),
        _pair("question", "response"),
        _pair("query", "response"),
        _pair("query", "answer"),
        _pair("instruction", "completion"),
        _pair("instruction", "answer"),
        _pair("input", "output"),
    ),
    (
        _label("text", "pair"),
        _label("text"),
        _label("sentence"),
        _label("sentence1", "sentence2"),
        _label("premise", "hypothesis"),
        _label("question1", "question2"),
        _label("question", "sentence"),
    ),
    (_document("text"), _document("content")),
)
# For `columns` alone: a single text with its class, which in the table is the second row of its kind.
_MAPPED = (*(kind[0] for kind in SHAPES[:3]), _label("text", "pair"), _label("text"), _document("text"))


def recognise(source: Source, columns: Mapping[str, str] | None = None) -> Form:
    """The form of all records of `source`.

    Args:
        source: the records.
        columns: role to column, where the data have other names: `{"prompt": "q", "completion": "a"}`. A role
            that is not mentioned is played by the column of its own name.

    Raises:
        DataError: no form fits, several do, a mapped column is not there, or the records differ.
    """
    first = source.records[0]
    shape = _mapped(first, columns) if columns else _found(first)
    optional = {role: column for role, column in shape.optional.items() if _anywhere(column, source.records)}
    _check_all(source.records, shape)
    form = shape.make({**shape.required, **optional})
    return Chat(form.columns, _dialect(first, form.columns["messages"])) if isinstance(form, Chat) else form


def _anywhere(column: str, records: Iterable[Record]) -> bool:
    return any(column in record.fields for record in records)


def _dialect(record: Record, column: str) -> Dialect:
    """ShareGPT's if the first turn has its keys; `conversations` is also the name of plain messages."""
    turns = record.fields[column]
    first = turns[0] if isinstance(turns, list) and turns else None
    return SHAREGPT if isinstance(first, dict) and SHAREGPT.role in first else MESSAGES


def _found(record: Record) -> Shape:
    keys = record.fields.keys()
    for kind in SHAPES:
        fits = [shape for shape in kind if keys >= set(shape.required.values())]
        # A row whose columns are some of another's is the lesser reading: text of text + pair.
        best = [shape for shape in fits if not any(_columns(shape) < _columns(other) for other in fits)]
        if len(best) > 1:
            raise DataError(
                "The columns can be read in two ways.",
                where=record.where,
                found=some(map(repr, keys), 12),
                expected="one of " + " | ".join(" + ".join(shape.required.values()) for shape in best),
                fix=f"say which: columns={dict(best[0].required)}, or remove the other columns",
            )
        if best:
            return best[0]
    spelled = {column for kind in SHAPES for shape in kind for column in shape.required.values()}
    raise DataError(
        "The form of the records is not recognised.",
        where=record.where,
        found="the columns " + some(map(repr, keys), 12),
        expected="\n            ".join(
            ["the columns of one of these rows:", *(" | ".join(map(str, kind)) for kind in SHAPES)]
        ),
        near=_near(keys, spelled),
        fix='say which column is which: columns={"prompt": "...", "completion": "..."}',
    )


def _columns(shape: Shape) -> set[str]:
    return set(shape.required.values())


def _near(keys: Iterable[str], spelled: Collection[str]) -> list[str]:
    folded = ((key, nearest(str(key).strip().casefold(), spelled, 1)) for key in keys)
    return [f"{key!r} ~ {near[0]!r}" for key, near in folded if near]


def _mapped(record: Record, columns: Mapping[str, str]) -> Shape:
    """The row that `columns` asks for, with its columns put in."""
    roles = {role for shape in _MAPPED for role in (*shape.required, *shape.optional)}
    for role in columns:
        if role not in roles:
            raise DataError(
                "The mapping of columns names a role that no form has.",
                where=f"columns={dict(columns)}",
                found=repr(role),
                expected=", ".join(sorted(roles)),
                near=nearest(role, roles),
                fix='map roles to columns, as in columns={"prompt": "q", "completion": "a"}',
            )
    for role, column in columns.items():
        if column not in record.fields:
            raise DataError(
                f"The column for the role {role!r} is not there.",
                where=record.where,
                found="the columns " + some(map(repr, record.fields), 12),
                expected=repr(column),
                near=nearest(column, record.fields),
                fix=f"name a column that is there in columns={dict(columns)}",
            )
    allowed = [shape for shape in _MAPPED if columns.keys() <= shape.required.keys() | shape.optional.keys()]
    exact = [shape for shape in allowed if shape.required.keys() <= columns.keys()]
    filled = [shape for shape in allowed if shape.required.keys() <= columns.keys() | record.fields.keys()]
    if not (exact or filled):
        raise DataError(
            "The mapping of columns makes no form.",
            where=f"columns={dict(columns)}",
            found="the roles " + ", ".join(columns),
            expected=" | ".join(" + ".join(shape.required) for shape in allowed or _MAPPED),
            fix="map all roles of one form",
        )
    shape = (exact or filled)[0]
    optional = {role: column for role, column in columns.items() if role in shape.optional}
    return Shape(shape.make, {role: columns.get(role, role) for role in shape.required}, optional)


def _check_all(records: Sequence[Record], shape: Shape) -> None:
    needed = set(shape.required.values())
    for place, record in enumerate(records):
        if not needed <= record.fields.keys():
            missing = [column for column in shape.required.values() if column not in record.fields]
            alike = [other.where for other in records[place + 1 :] if not needed <= other.fields.keys()]
            raise DataError(
                "The records do not all have the same columns.",
                where=f"{record.where} (and {len(alike):,} more like it: {some(alike, 3)})" if alike else record.where,
                found=f"no {some(map(repr, missing))} in the columns {some(map(repr, record.fields), 12)}",
                expected=f"the columns of {records[0].where}: {some(map(repr, records[0].fields), 12)}",
                near=[near for column in missing for near in nearest(column, record.fields, 1)],
                fix="write all records with the same columns, or keep each form in a file of its own",
            )


def left_out(source: Source, form: Form, used: Collection[str] = ()) -> tuple[str, ...]:
    """The columns of `source` that neither `form` reads nor `used` names, in order of appearance."""
    known = {*form.columns.values(), *used}
    seen = dict.fromkeys(column for record in source.records for column in record.fields)
    return tuple(column for column in seen if column not in known)


def announcement(source: Source, form: Form, used: Collection[str] = ()) -> str:
    """One sentence: where the records are from, how many, how they are read, and what is left out."""
    count = len(source.records)
    parts = [
        f"{source.name}: {source.format}, {count:,} record{'s' * (count != 1)} in {form.name} form ({form.describe()})"
    ]
    left = left_out(source, form, used)
    if left:
        parts.append(f"columns not used: {some(left)}")
    if source.note:
        parts.append(source.note)
    return "; ".join(parts)


def examples(source: Source, form: Form) -> list[Example]:
    """What each record means.

    Raises:
        DataError: of the first record that cannot be read, with the places of the others that fail alike.
    """
    read: list[Example] = []
    failed: list[tuple[DataError, str]] = []
    for record in source.records:
        try:
            read.append(form.example(record))
        except DataError as error:
            failed.append((error, record.where))
    if not failed:
        return read
    first = failed[0][0]
    alike = [where for error, where in failed[1:] if error.message == first.message]
    raise DataError(
        first.message,
        found=first.found,
        expected=first.expected,
        where=f"{first.where} (and {len(alike):,} more like it: {some(alike, 3)})" if alike else first.where,
        near=first.near,
        fix=first.fix,
    )


def label_names(labelled: Sequence[Labelled]) -> tuple[str, ...]:
    """The names of all classes: numbers by size, names by alphabet. The place of a name is its class index.

    Raises:
        DataError: some labels are names and some numbers, or there is one class alone.
    """
    kinds = {_kind(example.label): example for example in labelled}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise DataError(
            "The labels are of two kinds.",
            where=f"{one.where} and {other.where}",
            found=f"{one.label!r} and {other.label!r}",
            expected="all names, or all whole numbers; of numbers alone, all may have fractions (regression)",
            fix="write all labels alike",
        )
    names = {label_name(example) for example in labelled}
    if len(names) < 2:
        raise DataError(
            "There is one class alone, so there is nothing to tell apart.",
            where=labelled[0].where,
            found=f"the label {min(names)!r} on all {len(labelled):,} records",
            expected="at least two classes",
            fix="check that the column of labels is the right one",
        )
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numeric else (0, name)))


def _kind(label: str | int | float) -> type:
    """What a label is: 3.0 is a whole number as 3 is."""
    whole = isinstance(label, float) and label.is_integer()
    return int if whole else type(label)


def label_name(example: Labelled) -> str:
    """The name of its class: `3` for 3 and 3.0, `true` for True.

    Raises:
        DataError: the label is a number with a fraction, which is no class.
    """
    label = example.label
    if isinstance(label, float):
        if not label.is_integer():
            raise DataError(
                "A number with a fraction is no class.",
                where=example.where,
                found=repr(label),
                expected="a name or a whole number",
                fix="name the classes, or have the numbers themselves predicted: --task regression",
            )
        return str(int(label))
    return str(label).lower() if isinstance(label, bool) else str(label)
