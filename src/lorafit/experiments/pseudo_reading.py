"""Records without answers, read as the labelled ones are; and their answers put in, so that a run can train on them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lorafit.errors import DataError, nearest, some
from lorafit.training.examples import Conversation, Example, Labelled
from lorafit.training.formats import Record
from lorafit.training.forms import Alpaca, Chat, Form, PromptCompletion, TextLabel, label_name
from lorafit.training.sources import read_records

ANSWERS: Mapping[type[Form], str] = {TextLabel: "label", PromptCompletion: "completion", Alpaca: "output"}
"""The form of the records → the role whose column holds the answer. A chat has its answer in its last turn."""
BLANK = "?"
"""Stands for an answer until there is one."""


@final
@dataclass(frozen=True)
class Unlabelled:
    """Records whose answers are to be found.

    Attributes:
        records: as they were read, each with a placeholder for its answer.
        examples: what they mean; their answers are placeholders.
        own: the answers that the file has all the same, by the place of the record; they are never trained on.
        form: of the labelled data.
        said: what was left out and why, one sentence each.
        leaks: what was left out because another part asks it: the part → where it was read.
    """

    records: tuple[Record, ...]
    examples: tuple[Example, ...]
    own: Mapping[int, str]
    form: Form
    said: tuple[str, ...]
    leaks: Mapping[str, tuple[str, ...]]

    def answered(self, place: int, answer: Any) -> dict[str, Any]:
        """The fields of a record with this answer in place of the placeholder, for a file of the same form."""
        return _filled(self.form, self.records[place], answer).fields


def read_unlabelled(path: str, form: Form, known: Mapping[str, Sequence[Example]]) -> Unlabelled:
    """Reads records of which the column with the answer may be missing or empty.

    Args:
        path: a file, a directory or a hub name.
        form: how the labelled records are read.
        known: what else there is, by name ("the test part"): questions of it are left out of the unlabelled ones.

    Raises:
        DataError: a column is not there, a record cannot be read, or nothing is left.
    """
    source = read_records(path)
    if not isinstance(form, Chat) and type(form) not in ANSWERS:
        raise DataError(
            "These records have no answers that a model could give for others.",
            where=source.name,
            found=f"labelled records in {form.name} form ({form.describe()})",
            expected="texts with labels, or questions with answers",
            fix="give --data with labels or answers",
        )
    records, examples, own = [], [], {}
    for place, record in enumerate(source.records):
        _check_columns(record, form)
        given = _own_answer(form, record)
        blank = _filled(form, record, BLANK)
        records.append(blank)
        examples.append(form.example(blank))
        if given is not None:
            own[place] = given
    return _without(Unlabelled(tuple(records), tuple(examples), own, form, (), {}), known, source.name)


def _without(read: Unlabelled, known: Mapping[str, Sequence[Example]], name: str) -> Unlabelled:
    """Leaves out what is asked elsewhere, and what is asked again."""
    elsewhere: dict[Hashable, str] = {one.question(): part for part, all_ in known.items() for one in all_}
    kept: list[int] = []
    seen: set[Hashable] = set()
    again: list[str] = []
    leaks: dict[str, list[str]] = {part: [] for part in known}
    for place, example in enumerate(read.examples):
        question = example.question()
        if question in elsewhere:
            leaks[elsewhere[question]].append(example.where)
        elif question in seen:
            again.append(example.where)
        else:
            seen.add(question)
            kept.append(place)
    said = []
    if again:
        said.append(f"{len(again):,} unlabelled records left out: they come twice ({some(again, 3)})")
    own = {new: read.own[old] for new, old in enumerate(kept) if old in read.own}
    if own:
        said.append(
            f"{len(own):,} of the unlabelled records have an answer of their own: it is not trained on, and only "
            "compared with what the model says"
        )
    if not kept:
        raise DataError(
            "No unlabelled record is left.",
            where=name,
            found="; ".join([f"{len(read.examples):,} records", *_leaked(leaks), *said]),
            expected="questions that the labelled data do not ask",
            fix="give other unlabelled data",
        )
    return replace(
        read,
        records=tuple(read.records[place] for place in kept),
        examples=tuple(read.examples[place] for place in kept),
        own=own,
        said=tuple(said),
        leaks={part: tuple(places) for part, places in leaks.items()},
    )


def _leaked(leaks: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{len(places):,} asked by {part}" for part, places in leaks.items() if places]


def _check_columns(record: Record, form: Form) -> None:
    answer = ANSWERS.get(type(form))
    needed = {role: column for role, column in form.columns.items() if role not in (answer, "system", "input")}
    missing = [column for column in needed.values() if column not in record.fields]
    if missing:
        raise DataError(
            "The unlabelled records have not the columns of the labelled ones.",
            where=record.where,
            found="the columns " + some(map(repr, record.fields), 12),
            expected=f"{some(map(repr, needed.values()))}, as in the labelled data ({form.describe()})",
            near=[near for column in missing for near in nearest(column, record.fields, 1)],
            fix="name the columns as in the labelled data; the answer's may be left out",
        )


def _filled(form: Form, record: Record, answer: Any) -> Record:
    """The record with this answer."""
    if isinstance(form, Chat):
        column, dialect = form.columns["messages"], form.dialect
        turns = _asked(form, record)
        spoken = next(name for name, role in dialect.roles.items() if role == "assistant")
        fields = {**record.fields, column: [*turns, {dialect.role: spoken, dialect.content: answer}]}
    else:
        fields = {**record.fields, form.columns[ANSWERS[type(form)]]: answer}
    return Record({column: fields[column] for column in form.columns.values() if column in fields}, record.where)


def _asked(form: Chat, record: Record) -> list[Any]:
    """The turns before the last answer."""
    column, dialect = form.columns["messages"], form.dialect
    turns = record.fields[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"The value of {column!r} is not a list of turns.",
            where=record.where,
            found=repr(turns)[:60],
            expected="the turns up to the question",
            fix="write the turns as a list",
        )
    last = turns[-1]
    answered = isinstance(last, dict) and dialect.roles.get(last.get(dialect.role, "")) == "assistant"
    return turns[:-1] if answered else list(turns)


def _own_answer(form: Form, record: Record) -> str | None:
    """The answer that a record has itself, as the model's are compared with; None without one."""
    if isinstance(form, Chat):
        turns = record.fields[form.columns["messages"]]
        asked = _asked(form, record)
        return str(turns[-1].get(form.dialect.content)) if len(asked) < len(turns) else None
    value = record.fields.get(form.columns[ANSWERS[type(form)]])
    if value is None or value == "" or value == -1:  # -1 is what hub data sets write for "no label"
        return None
    return label_name(Labelled("", None, value, "")) if isinstance(form, TextLabel) else str(value)


def answer_name(example: Example) -> str:
    """The answer of a labelled record, as it is counted and compared.

    Raises:
        DataError: it has none.
    """
    if isinstance(example, Labelled):
        return label_name(example)
    if isinstance(example, Conversation):
        return example.turns[-1].content
    raise DataError(
        "The record has no answer.",
        where=example.where,
        found="a text",
        expected="a text with its label, or a question with its answer",
        fix="give --data with labels or answers",
    )


def line(fields: Mapping[str, Any]) -> str:
    """A record as a line of a JSON Lines file."""
    return json.dumps(fields, ensure_ascii=False, default=str) + "\n"
