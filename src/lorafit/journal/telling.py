"""What a loop came to, in the lines with which `lorafit train` ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

from lorafit.errors import LorafitError
from lorafit.report import write_report
from lorafit.training import costs
from lorafit.training.verdict import Ways

Say = Callable[[str], object]

WAYS = Ways(
    stop="if journal.overfits: break",
    longer="more epochs or steps",
    often="journal.evaluate in every epoch",
    look="look at the data",
)
"""What hints call the ways to change a loop of one's own."""


@final
@dataclass(frozen=True)
class Ended:
    """What a loop came to. What is not known is None.

    Attributes:
        steps: optimizer steps in all.
        resumed_from: the step from which this process went on.
        before, after: held-out loss before the first step, and of the adapter that was kept.
        accuracy_before, accuracy_after: the share of right predictions.
        train_seconds, seconds: time in steps, and in all, of this process.
        rate: examples per second of training.
        peak_rss_bytes: peak memory of this process.
        peak_device_bytes: peak memory on its accelerator.
        adapter: the adapter's folder.
        sentence, hints: the verdict.
        kept: the step of the adapter that was kept; None for the last one.
    """

    steps: int
    resumed_from: int
    before: float | None
    after: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    train_seconds: float
    seconds: float
    rate: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    adapter: str
    sentence: str | None
    hints: tuple[str, ...]
    kept: int | None

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> Ended:
        """What a finished loop came to, as its file has it."""
        known: dict[str, Any] = {field.name: result.get(field.name) for field in fields(cls)}
        return cls(**{**known, "hints": tuple(result.get("hints") or ()), "steps": int(result.get("steps") or 0)})

    def lines(self) -> Iterator[str]:
        """All but the report and the last line."""
        yield from _table(self._figures())
        yield costs.line(self, "" if self.rate is None else f"{self.rate:,.0f} examples/s")
        yield f"adapter: {self.adapter}"
        yield f"load it: lorafit.load(model, {self.adapter!r})"
        if self.sentence is not None:
            yield self.sentence
        yield from (f"hint: {each}" for each in self.hints)
        if self.kept is not None:
            yield f"kept: the adapter of step {self.kept:,}, which has the lowest loss"

    def last(self) -> str:
        """One plain line on the held-out loss; it claims no more than the two numbers."""
        if self.before is None or self.after is None:
            missing = "after" if self.before is not None else "before"
            return f"no held-out loss from {missing} training, so no comparison"
        gained = round(self.before, 3) - round(self.after, 3)  # of the numbers as they are shown
        if abs(gained) < 5e-4:
            return f"held-out loss {self.before:.3f} → {self.after:.3f} (no different)"
        word = "better" if gained > 0 else "worse"
        return f"held-out loss {self.before:.3f} → {self.after:.3f} ({word} by {abs(gained):.3f})"

    def _figures(self) -> list[tuple[str, str, str]]:
        rows = []
        if self.before is not None and self.after is not None:
            rows.append(("held-out loss", f"{self.before:.3f}", f"{self.after:.3f}"))
        if self.accuracy_before is not None and self.accuracy_after is not None:
            rows.append(("accuracy", f"{self.accuracy_before:.1%}", f"{self.accuracy_after:.1%}"))
        return rows


def report(records: Path, page: Path, say: Say) -> Path | None:
    """Draws the report, or says why there is none."""
    try:
        return write_report(records, page)
    except LorafitError as error:  # the loop is done, and its adapter is there
        say(f"no report: {error.message}" + ("" if error.fix is None else f"; {error.fix}"))
        return None


def _table(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    if not rows:
        return
    lines = [("", "before", "after"), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(3)]
    for name, before, after in lines:
        yield f"{name.ljust(widths[0])}  {before.rjust(widths[1])}  {after.rjust(widths[2])}"
