"""What one record means to a model: a `Conversation`, a `Document` or a `Labelled` text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

ROLES = ("system", "user", "assistant")


@final
@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


class Example(ABC):
    """One record, understood. `where` is where it was read."""

    where: str

    @abstractmethod
    def question(self) -> Hashable:
        """What the model is given: two examples with equal questions are the same question.

        Made of strings, tuples and None alone, so that it can be hashed alike on every machine.
        """


@final
@dataclass(frozen=True)
class Conversation(Example):
    """Turns, the last of which is the assistant's; a user's turn precedes the first of the assistant's."""

    turns: tuple[Turn, ...]
    where: str

    def question(self) -> Hashable:
        """All turns before the last."""
        return tuple((turn.role, turn.content) for turn in self.turns[:-1])


@final
@dataclass(frozen=True)
class Document(Example):
    """A text to be continued."""

    text: str
    where: str

    def question(self) -> Hashable:
        """The text."""
        return self.text


@final
@dataclass(frozen=True)
class Labelled(Example):
    """A text, or a pair of texts, and its label: a class (a name, an integer, a truth value) or a number."""

    text: str
    pair: str | None
    label: str | int | float
    where: str

    def question(self) -> Hashable:
        """The text or texts."""
        return self.text, self.pair
