"""How to read a record whose columns have known roles: one final class for each form.

Which columns have which roles is decided in `forms.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorafit.errors import DataError, nearest, some
from lorafit.training.examples import ROLES, Conversation, Document, Example, Labelled, Turn
from lorafit.training.formats import Record


class Form(ABC):
    """How to read a record: which column plays which role. `columns` maps roles to columns."""

    name: ClassVar[str]
    columns: Mapping[str, str]

    @abstractmethod
    def describe(self) -> str:
        """The columns, in the order of reading."""

    @abstractmethod
    def example(self, record: Record) -> Example:
        """What the record means.

        Raises:
            DataError: a value is missing, empty or of the wrong type.
        """


@final
@dataclass(frozen=True)
class Alpaca(Form):
    """An instruction, perhaps with an input below it, and an output; perhaps a system text."""

    columns: Mapping[str, str]
    name: ClassVar[str] = "alpaca"

    def describe(self) -> str:
        asked = [self.columns[role] for role in ("system", "instruction", "input") if role in self.columns]
        return f"{' + '.join(asked)} → {self.columns['output']}"

    def example(self, record: Record) -> Example:
        asked = _text(record, self.columns["instruction"])
        given = _optional(record, self.columns.get("input"))
        answer = _text(record, self.columns["output"])
        prompt = f"{asked}\n\n{given}" if given else asked
        return _pair(_optional(record, self.columns.get("system")), prompt, answer, record.where)


@final
@dataclass(frozen=True)
class PromptCompletion(Form):
    """A prompt and its completion; perhaps a system text."""

    columns: Mapping[str, str]
    name: ClassVar[str] = "prompt/completion"

    def describe(self) -> str:
        asked = [self.columns[role] for role in ("system", "prompt") if role in self.columns]
        return f"{' + '.join(asked)} → {self.columns['completion']}"

    def example(self, record: Record) -> Example:
        prompt = _text(record, self.columns["prompt"])
        answer = _text(record, self.columns["completion"])
        return _pair(_optional(record, self.columns.get("system")), prompt, answer, record.where)


@dataclass(frozen=True)
class Dialect:
    """How a chat names its parts: the key of the speaker, that of the words, and the speakers."""

    name: str
    role: str
    content: str
    roles: Mapping[str, str]


MESSAGES = Dialect("messages", "role", "content", {role: role for role in ROLES})
SHAREGPT = Dialect(
    "ShareGPT",
    "from",
    "value",
    {
        **dict.fromkeys(("human", "user"), "user"),
        **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
        "system": "system",
    },
)
# Keys of a message that change what should be learnt; to leave them out without a word would be wrong.
_MEANINGFUL = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "weight",
    "train",
    "loss",
    "reasoning_content",
    "thinking",
)


@final
@dataclass(frozen=True)
class Chat(Form):
    """A list of turns: `messages` of role and content, or ShareGPT's `conversations` of from and value."""

    columns: Mapping[str, str]
    dialect: Dialect = MESSAGES
    name: ClassVar[str] = "chat"

    def describe(self) -> str:
        column = self.columns["messages"]
        listed = f"{self.dialect.name}: {column} of {self.dialect.role} and {self.dialect.content}"
        return f"{self.columns['system']} + {listed}" if "system" in self.columns else listed

    def example(self, record: Record) -> Example:
        column = self.columns["messages"]
        turns = record.fields[column]
        if not isinstance(turns, list) or not turns:
            raise _wrong(
                record,
                column,
                turns,
                f"a list of turns, each with {self.dialect.role!r} and {self.dialect.content!r}",
                "chat data cannot be CSV: write them as JSON Lines"
                if isinstance(turns, str)
                else "write the turns as a list",
            )
        read = [self._turn(record, column, number, turn) for number, turn in enumerate(turns, start=1)]
        system = _optional(record, self.columns.get("system"))
        if system:
            read.insert(0, Turn("system", system))
        _check_order(read, record, column)
        return Conversation(tuple(read), record.where)

    def _turn(self, record: Record, column: str, number: int, turn: object) -> Turn:
        where = f"{record.where}, {column}, turn {number}"
        needed = (self.dialect.role, self.dialect.content)
        if not isinstance(turn, dict) or any(key not in turn for key in needed):
            keys = f"the keys {some(map(repr, turn))}" if isinstance(turn, dict) else _show(turn)
            raise DataError(
                "The turn is not of this chat's form.",
                where=where,
                found=keys,
                expected=f"{needed[0]!r} and {needed[1]!r}",
                fix="write all turns of all records alike",
            )
        role, content = turn[needed[0]], turn[needed[1]]
        if role not in self.dialect.roles:
            raise DataError(
                "The role of the turn is unknown.",
                where=where,
                found=_show(role),
                expected=", ".join(self.dialect.roles),
                near=nearest(str(role), self.dialect.roles),
                fix="rename the role; turns of tools and functions are not supported: leave such records out",
            )
        meant = [key for key in _MEANINGFUL if turn.get(key) is not None]
        if meant:
            raise DataError(
                "The turn has a key that is not supported.",
                where=where,
                found=f"{meant[0]!r}: {_show(turn[meant[0]])}",
                expected=f"only {needed[0]!r} and {needed[1]!r}",
                fix="leave the record out, or write its meaning into the content and remove the key",
            )
        return Turn(self.dialect.roles[role], _checked(content, where, f"the content of {role!r}"))


@final
@dataclass(frozen=True)
class Text(Form):
    """A text, every token of which is learnt."""

    columns: Mapping[str, str]
    name: ClassVar[str] = "text"

    def describe(self) -> str:
        return f"{self.columns['text']}, every token is learnt"

    def example(self, record: Record) -> Example:
        return Document(_text(record, self.columns["text"]), record.where)


@final
@dataclass(frozen=True)
class TextLabel(Form):
    """A text or a pair of texts, and its label: a class, or a number to predict."""

    columns: Mapping[str, str]
    name: ClassVar[str] = "text/label"

    def describe(self) -> str:
        texts = [self.columns[role] for role in ("text", "pair") if role in self.columns]
        return f"{' + '.join(texts)} → {self.columns['label']}"

    def example(self, record: Record) -> Example:
        text = _text(record, self.columns["text"])
        pair = _text(record, self.columns["pair"]) if "pair" in self.columns else None
        column = self.columns["label"]
        label = record.fields[column]
        endless = isinstance(label, float) and not math.isfinite(label)
        if not isinstance(label, (str, int, float)) or label == "" or endless:
            raise _wrong(
                record, column, label, "a class (a name or an integer) or a number", "label the record, or leave it out"
            )
        return Labelled(text, pair, label, record.where)


# Values ---------------------------------------------------------------------


def _pair(system: str, prompt: str, answer: str, where: str) -> Conversation:
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return Conversation((Turn("system", system), *turns) if system else turns, where)


def _optional(record: Record, column: str | None) -> str:
    value = record.fields.get(column) if column is not None else None
    if value is None or value == "":
        return ""
    return _text(record, column or "")


def _text(record: Record, column: str) -> str:
    return _checked(record.fields[column], record.where, repr(column))


def _checked(value: object, where: str, what: str) -> str:
    """`value`, a string that has words in it and that a tokenizer can read."""
    if not isinstance(value, str):
        fix = "leave the record out" if value is None else "write it as a string, in quotes"
        raise DataError(
            f"The value of {what} is not a string.",
            where=where,
            found=_show(value),
            expected="a string",
            fix=fix,
        )
    if not value.strip():
        raise DataError(
            f"The value of {what} is empty.",
            where=where,
            found=repr(value),
            expected="at least one word",
            fix="fill it in, or leave the record out",
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The value of {what} has half a character.",
                where=where,
                found=f"the lone surrogate {value[error.start]!r} at character {error.start}",
                expected="whole Unicode characters",
                fix="write the file again, with escapes like \\ud83d\\ude00 in pairs",
            ) from None
    return value


def _wrong(record: Record, column: str, value: object, expected: str, fix: str) -> DataError:
    return DataError(
        f"The value of {column!r} is of the wrong kind.",
        where=record.where,
        found=_show(value),
        expected=expected,
        fix=fix,
    )


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"


def _check_order(turns: Sequence[Turn], record: Record, column: str) -> None:
    where = f"{record.where}, {column}"
    roles = [turn.role for turn in turns]
    said = " ".join(roles)
    if roles[-1] != "assistant":
        raise DataError(
            "The last turn is not the assistant's, so there is no answer to learn.",
            where=where,
            found=said,
            expected="... assistant",
            fix="take the last turn off, or leave the record out",
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(
            "The assistant speaks first, so there is no question to its answer.",
            where=where,
            found=said,
            expected="user assistant ..., perhaps with a system turn in front",
            fix="put the user's turn in front of it, or take the turn off",
        )
