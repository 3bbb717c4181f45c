"""Every error and warning this library raises, drawn as a tree.

    LorafitError
    ├── ConfigError        a setting has a value it cannot have
    ├── TargetError        a pattern names a module that is not there or cannot be adapted
    ├── CheckpointError    a file of an adapter cannot be read or written, or does not fit the model
    ├── MergeError         a weight cannot take its update
    ├── StateError         a call comes at a time when it cannot be answered
    ├── TrainingError      a run cannot start or go on
    ├── DataError          records cannot be read, recognised or learned from
    └── MissingExtraError  an optional dependency is not installed

    LorafitWarning         something was noticed that does not stop the work

Each message says what was found, what was expected, where, the nearest valid name and one fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorafitError(Exception):
    """The root of all errors of this library.

    Args:
        message: what is wrong, in one sentence.
        found: what was met.
        expected: what would have been right.
        where: file and line, key, or module path.
        near: names that exist and resemble the one that does not.
        fix: one thing that mends it.
    """

    def __init__(
        self,
        message: str,
        *,
        found: object = None,
        expected: object = None,
        where: object = None,
        near: Iterable[str] = (),
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.found = found
        self.expected = expected
        self.where = where
        self.near = tuple(near)
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        rows = [self.message]
        if self.where is not None:
            rows.append(f"  where:    {self.where}")
        if self.found is not None:
            rows.append(f"  found:    {self.found}")
        if self.expected is not None:
            rows.append(f"  expected: {self.expected}")
        if self.near:
            rows.append(f"  nearest:  {', '.join(self.near)}")
        if self.fix is not None:
            rows.append(f"  fix:      {self.fix}")
        return "\n".join(rows)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not unpickle on their own; data loader workers need that.
        return _rebuild, (type(self), self.message, dict(self._parts()))

    def _parts(self) -> Iterable[tuple[str, object]]:
        return (
            ("found", self.found),
            ("expected", self.expected),
            ("where", self.where),
            ("near", self.near),
            ("fix", self.fix),
        )


def _rebuild(kind: type[LorafitError], message: str, parts: dict[str, object]) -> LorafitError:
    return kind(message, **parts)  # type: ignore[arg-type]


class ConfigError(LorafitError, ValueError):
    """A setting has a value it cannot have."""


class TargetError(LorafitError, ValueError):
    """A pattern names a module that is not there or cannot be adapted."""


class CheckpointError(LorafitError):
    """A file of an adapter cannot be read or written, or does not fit the model."""


class MergeError(LorafitError):
    """A weight cannot take its update."""


class StateError(LorafitError, RuntimeError):
    """A call comes at a time when it cannot be answered."""


class TrainingError(LorafitError, RuntimeError):
    """A run cannot start or go on."""


class DataError(LorafitError, ValueError):
    """Records cannot be read, recognised or learned from."""


class MissingExtraError(LorafitError, ImportError):
    """An optional dependency is not installed."""


class LorafitWarning(UserWarning):
    """Something was noticed that does not stop the work."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> tuple[str, ...]:
    """Up to `n` of `candidates` that resemble `name`, best first.

    >>> nearest("learnig_rate", ["learning_rate", "warmup_steps"])
    ('learning_rate',)
    """
    return tuple(difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.6))


def some(names: Iterable[str], limit: int = 5) -> str:
    """A few of many names, with the count of those left out.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    listed = list(names)
    head = ", ".join(listed[:limit])
    left = len(listed) - limit
    return f"{head} and {left} more" if left > 0 else head


def check_attached(name: str, known: Iterable[str]) -> None:
    """Raises `StateError` for the name of an adapter that is not among those that are attached."""
    names = list(known)
    if name not in names:
        raise StateError(
            "no adapter of this name is attached",
            found=repr(name),
            expected=f"names among {some(names)}",
            near=nearest(str(name), names),
            fix="attach or load it first",
        )
