"""What a run found beside its held-out loss, as recorded: of a general text, of slices, of another domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafit.report.lines import Line


@dataclass(frozen=True)
class Moved:
    """A mean over the same records before and after. What was not recorded, or not known, is None.

    Attributes:
        records: how many.
        before: the mean before.
        after: that after.
        change: the difference.
        margin: half the width of its 95 % interval.
    """

    records: int | None
    before: float | None
    after: float | None
    change: float | None
    margin: float | None

    @classmethod
    def read(cls, line: Line) -> Moved:
        """That of a part of a record."""
        numbers = (line.number(key) for key in ("before", "after", "change", "margin"))
        return cls(line.count("records"), *numbers)


@dataclass(frozen=True)
class Forgetting:
    """What became of a general text."""

    event: ClassVar[str] = "forgetting"

    text: str
    loss: Moved
    sentence: str
    hints: tuple[str, ...]

    @classmethod
    def read(cls, line: Line) -> Forgetting:
        """That which `line` records."""
        return cls(
            text=line.needed("text", line.text),
            loss=Moved.read(line.needed("loss", line.part)),
            sentence=line.needed("sentence", line.text),
            hints=line.texts("hints"),
        )


@dataclass(frozen=True)
class Slice:
    """Held-out records that have one value in common, and whether their loss rose or fell."""

    name: str
    loss: Moved
    worse: bool
    better: bool


@dataclass(frozen=True)
class Slices:
    """What became of each slice of the held-out records."""

    event: ClassVar[str] = "slices"

    column: str
    parts: tuple[Slice, ...]
    sentence: str
    hints: tuple[str, ...]

    @classmethod
    def read(cls, line: Line) -> Slices:
        """Those which `line` records."""
        return cls(
            column=line.needed("column", line.text),
            parts=tuple(_slice(part) for part in line.parts("parts")),
            sentence=line.needed("sentence", line.text),
            hints=line.texts("hints"),
        )


def _slice(line: Line) -> Slice:
    loss = Moved.read(line.needed("loss", line.part))
    return Slice(line.needed("name", line.text), loss, line.flag("worse"), line.flag("better"))


@dataclass(frozen=True)
class Gap:
    """How much more the target has than the source, and half the widths of the 95 % intervals."""

    before: float | None
    before_margin: float | None
    after: float | None
    after_margin: float | None
    change: float | None
    change_margin: float | None

    @classmethod
    def read(cls, line: Line) -> Gap:
        """That of a part of a record."""
        return cls(
            before=line.number("before"),
            before_margin=line.number("before_margin"),
            after=line.number("after"),
            after_margin=line.number("after_margin"),
            change=line.number("change"),
            change_margin=line.number("change_margin"),
        )


@dataclass(frozen=True)
class Compared:
    """One measure on the source, where it was held out, and on the target."""

    on_source: Moved | None
    on_target: Moved
    gap: Gap | None

    @classmethod
    def read(cls, line: Line) -> Compared:
        """That of a part of a record."""
        source, gap = line.part("on_source"), line.part("gap")
        return cls(
            on_source=None if source is None else Moved.read(source),
            on_target=Moved.read(line.needed("on_target", line.part)),
            gap=None if gap is None else Gap.read(gap),
        )


@dataclass(frozen=True)
class Shift:
    """What became of another domain."""

    event: ClassVar[str] = "shift"

    source: str
    target: str
    loss: Compared
    accuracy: Compared | None
    sentence: str
    hints: tuple[str, ...]

    @classmethod
    def read(cls, line: Line) -> Shift:
        """That which `line` records."""
        accuracy = line.part("accuracy")
        return cls(
            source=line.needed("source", line.text),
            target=line.needed("target", line.text),
            loss=Compared.read(line.needed("loss", line.part)),
            accuracy=None if accuracy is None else Compared.read(accuracy),
            sentence=line.needed("sentence", line.text),
            hints=line.texts("hints"),
        )
