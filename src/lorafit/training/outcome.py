"""What a run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.training.findings import Findings
from lorafit.training.folder import RunFolder


@dataclass(frozen=True)
class Shown:
    """One held-out question and its answers."""

    prompt: str
    gold: str
    before: str
    after: str


@dataclass(frozen=True)
class Told:
    """The verdict on a run, for people and for files.

    Attributes:
        kind: in a word.
        sentence: the same with its numbers.
        hints: what to do about it.
        kept: the step of the adapter that was kept, None for the last one.
    """

    kind: str
    sentence: str
    hints: tuple[str, ...]
    kept: int | None

    @classmethod
    def read(cls, told: Mapping[str, Any] | None) -> Told | None:
        """That of a result, if it has one."""
        return None if told is None else cls(**{**told, "hints": tuple(told["hints"])})

    def lines(self) -> list[str]:
        """The verdict, what to do about it, and which adapter was kept."""
        kept = [] if self.kept is None else [f"kept: the adapter of step {self.kept:,}, which has the lowest loss"]
        return [self.sentence, *(f"hint: {each}" for each in self.hints), *kept]


AGREEMENT = ("mean_absolute_error", "pearson", "spearman")
"""What is told of a regression beside its loss, in records of evaluations; with their ends, `_low` and `_high`."""


def agreed(folder: RunFolder, step: int) -> dict[str, float]:
    """How well numbers were predicted at a step, as the records of a run have it; empty where they do not."""
    names = [f"{name}{end}" for name in AGREEMENT for end in ("", "_low", "_high")]
    found = [one for one in folder.recorded("evaluation") if one.get("step") == step]
    return {name: found[-1][name] for name in names if found and found[-1].get(name) is not None}


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        status: "done", "interrupted", or "already done" for a run that was finished before.
        folder: where everything is.
        adapter: the finished adapter (a checkpoint, if interrupted).
        steps: optimizer steps done in all.
        resumed_from: the step from which the last process went on.
        eval_before, eval_after: held-out loss of a prediction, None without held-out data.
        train_seconds: time in steps, in this process.
        seconds: time in all, in this process.
        peak_rss_bytes: peak memory of this process, None where the system does not tell.
        peak_device_bytes: peak memory on its accelerator; None without one.
        shown: questions answered before and after.
        verdict: what became of the run, None without held-out data.
        findings: what else became of it: of a general text, of slices, of another domain.
        unit: what a loss counts, behind a number; empty in results of before it was recorded.
    """

    status: str
    folder: RunFolder
    adapter: Path
    steps: int
    resumed_from: int
    eval_before: float | None
    eval_after: float | None
    train_seconds: float
    seconds: float
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    shown: tuple[Shown, ...]
    verdict: Told | None = None
    findings: Findings = field(default_factory=Findings)
    unit: str = ""

    def figures(self) -> dict[str, Any]:
        """What the records and the result hold of it."""
        return {
            "status": self.status,
            "steps": self.steps,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "eval_loss_before": self.eval_before,
            "eval_loss_after": self.eval_after,
        }

    @classmethod
    def read(cls, done: Mapping[str, Any], folder: RunFolder) -> Outcome:
        """That of a run which was finished before."""
        return cls(
            status="already done",
            folder=folder,
            adapter=folder.adapter,
            steps=done["steps"],
            resumed_from=done["resumed_from"],
            eval_before=done["eval_loss_before"],
            eval_after=done["eval_loss_after"],
            train_seconds=done["train_seconds"],
            seconds=done["seconds"],
            peak_rss_bytes=done["peak_rss_bytes"],
            peak_device_bytes=done.get("peak_device_bytes"),
            shown=tuple(Shown(**one) for one in done["shown"]),
            verdict=Told.read(done.get("verdict")),
            findings=Findings.read(done.get("findings", {})),
            unit=done.get("unit", ""),
        )
