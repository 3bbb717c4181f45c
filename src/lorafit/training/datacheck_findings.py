"""What a check finds, gathered kind by kind: how many, the first few places, and one fix for all of them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any, final

from lorafit.errors import LorafitError

SHOWN = 5
"""Places that a finding names."""


@final
class Level(enum.Enum):
    """How bad it is: an error must be mended, a warning should be looked at, a note is good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@final
@dataclasses.dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        level: how bad it is.
        name: a short name for programs.
        text: what it is, in one sentence.
        fix: one thing that mends it.
        field: the column or the setting; empty where it is neither.
        found: the first of what was met; empty where the sentence says it.
        count: how many records (or settings) it is about.
        at: the first few places.
    """

    level: Level
    name: str
    text: str
    fix: str
    field: str = ""
    found: str = ""
    count: int = 0
    at: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "level": self.level.value,
            "name": self.name,
            "text": self.text,
            "field": self.field or None,
            "found": self.found or None,
            "count": self.count,
            "at": self.at,
            "fix": self.fix,
        }


@final
class Findings:
    """All that was found, the worst first. Holds a few places of each kind, however many records there are."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str, str], Finding] = {}

    def add(
        self,
        level: Level,
        name: str,
        text: str,
        where: str,
        *,
        fix: str,
        field: str = "",
        found: str = "",
        count: int = 1,
    ) -> None:
        """Notes `count` more of a kind, which is told by name, field and text."""
        kind = self._kinds.setdefault((name, field, text), Finding(level, name, text, fix, field, found))
        kind.count += count
        if where and len(kind.at) < SHOWN and where not in kind.at:
            kind.at.append(where)

    def all(
        self, level: Level, name: str, text: str, wheres: Iterable[str], *, fix: str, field: str = "", found: str = ""
    ) -> None:
        """Notes one for each place."""
        for where in wheres:
            self.add(level, name, text, where, fix=fix, field=field, found=found)

    def raised(self, error: LorafitError, name: str, field: str = "") -> None:
        """Notes an error that a run would end with."""
        where = "" if error.where is None else str(error.where)
        found = "" if error.found is None else str(error.found)
        near = f" (nearest: {', '.join(error.near)})" if error.near else ""
        self.add(
            Level.ERROR, name, error.message, where, fix=f"{error.fix or 'see above'}{near}", field=field, found=found
        )

    def listed(self) -> list[Finding]:
        """Errors first, then warnings, then notes; each in the order in which they were met."""
        order = list(Level)
        return sorted(self._kinds.values(), key=lambda finding: order.index(finding.level))

    @property
    def errors(self) -> list[Finding]:
        """What must be mended."""
        return [finding for finding in self._kinds.values() if finding.level is Level.ERROR]
