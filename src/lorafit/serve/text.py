"""The text of an answer while it is written: whole characters only, and nothing of a stop string.

What is told piece by piece is, put together, what the tokenizer makes of all the tokens at once. The one exception:
some tokenizers give up a whole run of bytes for one that fits in no character, also those that had made characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "\ufffd"
"""What bytes decode to that make no character, or do not make it yet."""
HELD = 8
"""Tokens after which bytes that make no character are told as they are: no character has more than four bytes."""


@final
class Decoder:
    """Text of tokens that come one at a time.

    What a token adds is the difference that it makes to the text of the tokens before it, since many tokenizers write
    a token differently at the beginning of a text. Only the tokens since the last but one text that was told are
    decoded for it, not the whole answer.

    Args:
        tokenizer: whose tokens they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # so many of `_ids` have been told, as `_before`; they are here for what follows them
        self._before = ""

    def add(self, token: int) -> str:
        """What can be told now; nothing while a character is not whole."""
        self._ids.append(token)
        text = self._decoded()
        if text.endswith(UNKNOWN) and len(self._ids) - self._told < HELD:
            return ""
        return self._tell(text)

    def rest(self) -> str:
        """What is still held back, when no token follows any more."""
        return self._tell(self._decoded()) if len(self._ids) > self._told else ""

    def _tell(self, text: str) -> str:
        new = text[len(self._before) :]
        if new:
            del self._ids[: self._told]
            self._told = len(self._ids)
            self._before = self._decoded()
        elif len(self._ids) - self._told >= HELD:  # special tokens, which have no text
            del self._ids[self._told :]
        return new

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


@final
class Stops:
    """Finds the stop string that a text completes first, in whatever pieces it comes; holds back what may become one.

    Args:
        stops: the strings; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be told now, and whether a stop string ends it there."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[kept:]
        return text[:kept], False

    def rest(self) -> str:
        """What is still held back, when no text follows any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`.

    >>> _overlap("to be or no", "not to be")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@final
class Answer:
    """The text of one answer.

    Args:
        tokenizer: whose tokens it is written in.
        stops: texts that end it and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._decoder = Decoder(tokenizer)
        self._stops = Stops(stops)

    def add(self, token: int) -> tuple[str, bool]:
        """What can be told now, and whether a stop string ends the answer there."""
        return self._stops.add(self._decoder.add(token))

    def rest(self) -> tuple[str, bool]:
        """What is still held back, when no token follows any more, and whether a stop string was in it."""
        text, stopped = self._stops.add(self._decoder.rest())
        return (text, True) if stopped else (text + self._stops.rest(), False)
