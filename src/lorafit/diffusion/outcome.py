"""What a DreamBooth run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.diffusion.folder import RunFolder
from lorafit.training.outcome import Told


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        status: "done", "interrupted", or "already done" for a run that was finished before.
        folder: where everything is.
        adapter: the folder of the finished adapter (a checkpoint, if interrupted).
        steps: optimizer steps done in all.
        resumed_from: the step from which the last process went on.
        eval_before, eval_after: held-out loss on the subject.
        prior_before, prior_after: loss on fixed noises of the class pictures; None without a class prompt.
        train_seconds: time in steps, in this process.
        seconds: time in all, in this process.
        peak_rss_bytes: peak memory of this process, None where the system does not tell.
        peak_device_bytes: peak memory on its accelerator; None without one.
        sheets: the sheets of samples, in the order of their steps.
        verdict: what became of the run; None while it is not done.
    """

    status: str
    folder: RunFolder
    adapter: Path
    steps: int
    resumed_from: int
    eval_before: float | None
    eval_after: float | None
    prior_before: float | None
    prior_after: float | None
    train_seconds: float
    seconds: float
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    sheets: tuple[Path, ...] = ()
    verdict: Told | None = None

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
            "prior_loss_before": self.prior_before,
            "prior_loss_after": self.prior_after,
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
            eval_before=done.get("eval_loss_before"),
            eval_after=done.get("eval_loss_after"),
            prior_before=done.get("prior_loss_before"),
            prior_after=done.get("prior_loss_after"),
            train_seconds=done.get("train_seconds", 0.0),
            seconds=done.get("seconds", 0.0),
            peak_rss_bytes=done.get("peak_rss_bytes"),
            peak_device_bytes=done.get("peak_device_bytes"),
            sheets=folder.sheets(),
            verdict=Told.read(done.get("verdict")),
        )
