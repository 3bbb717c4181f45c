r"""Paths and patterns of them at a cost that does not grow with their product: a thousand layers, a rank for each.

Pure strings. What `Patterns` finds is what PEFT's own expression finds, `(.*\.)?(key)` for the whole path, first key
first; a key that is plain text, as those of one layer are, is looked up instead of tried.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")
Shape = tuple[bool, int, tuple[int, ...]]
"""Of a plain key: whether it stands for whole paths only, its length, and where any one character fits."""
OPERATORS = frozenset("*+?{}[]()|^$\\")


def tails(path: str) -> Iterator[str]:
    """The path, then what is left of it without its first component, and so on to the last one."""
    yield path
    start = path.find(".") + 1
    while start:
        yield path[start:]
        start = path.find(".", start) + 1


def heads(path: str) -> Iterator[str]:
    """The paths around a path, the outermost first, and the path itself last; the model itself ("") is left out."""
    end = path.find(".")
    while end >= 0:
        yield path[:end]
        end = path.find(".", end + 1)
    yield path


def inside(path: str, roots: Collection[str]) -> bool:
    """Whether a path is one of `roots`, a set or a mapping, or below one."""
    return any(head in roots for head in heads(path))


class Patterns(Generic[Value]):
    """Path patterns and their values, such as the ranks of single layers.

    Args:
        pattern: regular expression → value. An expression fits a path that it matches in whole, or from a dot on to the
            end.

    Raises:
        re.error: a key that is no regular expression.
    """

    def __init__(self, pattern: Mapping[str, Value]) -> None:
        self._rows = list(pattern.items())
        self._plain: dict[Shape, dict[str, list[int]]] = {}
        self._regular: list[tuple[int, re.Pattern[str]]] = []
        for number, (key, _) in enumerate(self._rows):
            plain = _plain(key)
            if plain is None:
                self._regular.append((number, expression(key)))
            else:
                whole, text, anything = plain
                shape = (whole, len(text), anything)
                self._plain.setdefault(shape, {}).setdefault(text, []).append(number)

    def find(self, path: str) -> Value | None:
        """The value of the first key that fits the path."""
        number = min(self._fitting(path), default=None)
        return None if number is None else self._rows[number][1]

    def idle(self, paths: Collection[str]) -> list[str]:
        """The keys that fit none of the paths."""
        used = {number for path in paths for number in self._fitting(path)} if self._rows else set()
        return [key for number, (key, _) in enumerate(self._rows) if number not in used]

    def _fitting(self, path: str) -> Iterator[int]:
        if "\n" in path:  # which a dot of an expression does not stand for
            yield from (number for number, (key, _) in enumerate(self._rows) if expression(key).fullmatch(path))
            return
        for (whole, length, anything), keys in self._plain.items():
            start = len(path) - length
            if start == 0 or (start > 0 and not whole and path[start - 1] == "."):
                yield from keys.get(_blanked(path[start:], anything), ())
        for number, compiled in self._regular:
            if compiled.fullmatch(path):
                yield number


def expression(key: str) -> re.Pattern[str]:
    """What a key fits: a path's end, from a dot on, or the whole path. Raises re.error for what is no expression."""
    return re.compile(rf"(.*\.)?({key})")


def _plain(key: str) -> tuple[bool, str, tuple[int, ...]] | None:
    """A key without operators as (for whole paths only, text, where a dot stands for any character), or None."""
    whole = key.startswith("^")
    rest = key[whole:]
    text: list[str] = []
    anything: list[int] = []
    at = 0
    while at < len(rest):
        escaped = rest[at] == "\\" and at + 1 < len(rest) and not rest[at + 1].isalnum()
        if escaped:
            at += 1
        elif rest[at] == ".":
            anything.append(len(text))
        elif rest[at] in OPERATORS:
            return None
        text.append(rest[at])
        at += 1
    return (whole, "".join(text), tuple(anything)) if text else None


def _blanked(text: str, places: tuple[int, ...]) -> str:
    """The text with a dot at each of these places."""
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)
