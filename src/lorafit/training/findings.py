"""What a run found beside its held-out loss, as values: of a general text, of slices, of another domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from lorafit.training.verdict import Evaluation, change


def finite(value: float) -> float | None:
    """The number, None where it is not finite: so are margins that nothing is known of."""
    return value if math.isfinite(value) else None


@final
@dataclass(frozen=True)
class Moved:
    """A mean over the same records before and after, and how far it moved.

    Attributes:
        records: how many.
        before, after: the means.
        change: the difference.
        margin: half the width of its 95 % interval; None where that is not known, as of one record alone.
    """

    records: int
    before: float
    after: float
    change: float
    margin: float | None

    @classmethod
    def of(cls, before: Evaluation, after: Evaluation) -> Moved:
        """That of two evaluations of the same records."""
        found = change(before, after)
        return cls(len(after.counts), before.mean, after.mean, found.value, finite(found.margin))

    @property
    def rose(self) -> bool:
        """Whether the interval lies above nothing."""
        return self.margin is not None and self.change - self.margin > 0

    @property
    def fell(self) -> bool:
        """Whether the interval lies below nothing."""
        return self.margin is not None and self.change + self.margin < 0

    def told(self) -> str:
        """Both means and the change.

        >>> Moved(9, 3.21, 3.4, 0.19, 0.03).told()
        '3.210 → 3.400 (+0.190 ± 0.030)'
        """
        return f"{self.before:.3f} → {self.after:.3f} ({self.changed()})"

    def changed(self) -> str:
        """The change with its margin."""
        return f"{self.change:+.3f}" + ("" if self.margin is None else f" ± {self.margin:.3f}")


@final
@dataclass(frozen=True)
class Forgetting:
    """What became of a general text.

    Attributes:
        text: which one.
        loss: nats per token.
        sentence: the same for people.
        hints: what to do about it, if it is much.
    """

    text: str
    loss: Moved
    sentence: str
    hints: tuple[str, ...]


@final
@dataclass(frozen=True)
class Slice:
    """What became of the held-out records with one value.

    Attributes:
        name: the value.
        loss: nats per prediction.
        worse, better: whether that rose or fell by more than chance would have it for one of so many slices.
    """

    name: str
    loss: Moved
    worse: bool
    better: bool


@final
@dataclass(frozen=True)
class Slices:
    """What became of each part of the held-out records.

    Attributes:
        column: by which they are told apart.
        parts: the slices, the one whose loss rose most first.
        sentence: the same for people.
        hints: what to do about those that got worse.
    """

    column: str
    parts: tuple[Slice, ...]
    sentence: str
    hints: tuple[str, ...]


@final
@dataclass(frozen=True)
class Gap:
    """How much more the target has than the source, with half the widths of the 95 % intervals, where known."""

    before: float
    before_margin: float | None
    after: float
    after_margin: float | None
    change: float
    change_margin: float | None


@final
@dataclass(frozen=True)
class Compared:
    """One measure on held-out records of the source, where there are any, and on the target."""

    on_source: Moved | None
    on_target: Moved
    gap: Gap | None


@final
@dataclass(frozen=True)
class Shift:
    """What became of another domain than that of the data.

    Attributes:
        source, target: the names of the data.
        loss: nats per prediction.
        accuracy: of a classifier.
        sentence: whether what was learnt carries over.
        hints: what to do where it does not.
    """

    source: str
    target: str
    loss: Compared
    accuracy: Compared | None
    sentence: str
    hints: tuple[str, ...]


@final
@dataclass(frozen=True)
class Findings:
    """All that was found; None for what was not looked at."""

    forgetting: Forgetting | None = None
    slices: Slices | None = None
    shift: Shift | None = None

    def lines(self) -> list[str]:
        """For people: each sentence, and its hints behind it (those on slices are among the verdict's)."""
        told = []
        for found in (self.forgetting, self.shift):
            if found is not None:
                told += [found.sentence, *(f"hint: {each}" for each in found.hints)]
        return told if self.slices is None else [self.slices.sentence, *told]

    def as_json(self) -> dict[str, Any]:
        """As it is written to files."""
        return {key: None if value is None else asdict(value) for key, value in vars(self).items()}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Findings:
        """What `as_json` wrote."""
        text, parts, shift = (found.get(key) for key in ("forgetting", "slices", "shift"))
        return cls(
            None if text is None else Forgetting(**_with_hints(text, loss=Moved(**text["loss"]))),
            None if parts is None else Slices(**_with_hints(parts, parts=tuple(map(_slice, parts["parts"])))),
            None if shift is None else Shift(**_with_hints(shift, **_both(shift))),
        )


def _with_hints(found: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    return {**found, **changed, "hints": tuple(found["hints"])}


def _slice(found: Mapping[str, Any]) -> Slice:
    return Slice(**{**found, "loss": Moved(**found["loss"])})


def _both(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if found[key] is None else _compared(found[key]) for key in ("loss", "accuracy")}


def _compared(found: Mapping[str, Any]) -> Compared:
    source, gap = found["on_source"], found["gap"]
    return Compared(
        None if source is None else Moved(**source),
        Moved(**found["on_target"]),
        None if gap is None else Gap(**gap),
    )
