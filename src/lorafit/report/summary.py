"""What a run came to: the few numbers at the head of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from lorafit.report.records import Evaluation, Run

ROUNDED = 1e-6
"""The loss of the adapter that was kept is the mean of records' losses that are rounded to seven digits."""


@dataclass(frozen=True)
class Measure:
    """The held-out measurement at one end of the training. What is not known is None."""

    step: int | None
    loss: float | None
    perplexity: float | None
    accuracy: float | None
    agreement: Mapping[str, float] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether it is of a classifier or a regression, rather than of a language model."""
        return self.accuracy is not None or bool(self.agreement)

    def knows(self, key: str) -> bool:
        """Whether this was measured of predicted numbers."""
        return key in self.agreement

    def told(self, key: str) -> str:
        """A measure of predicted numbers with its interval, for people; that it is not defined where it is not there.

        >>> Measure(1, 0.5, None, None, {"pearson": 0.5, "pearson_low": 0.4, "pearson_high": 0.6}).told("pearson")
        '0.500 (0.400 to 0.600)'
        """
        if key not in self.agreement:
            return "not defined"
        low, high = self.agreement.get(f"{key}_low"), self.agreement.get(f"{key}_high")
        ends = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
        return f"{self.agreement[key]:.3f}{ends}"


@dataclass(frozen=True)
class Summary:
    """The headline of a run. What is not known is None.

    Attributes:
        status: `done`, `interrupted`, `failed`, or `no end` when the last process recorded none.
        before: the held-out measurement before the training.
        after: the one after it, or the last one of a run that did not come to its end.
        change: relative change of the held-out loss; negative is better.
        seconds: how long all processes took together.
        train_seconds: how much of that was training.
        tokens_per_second: the median over the logged steps.
        examples_per_second: the same, where records were counted and not tokens.
        peak_bytes: the largest peak of resident memory.
        device_bytes: the largest peak of memory on an accelerator.
        trainable: trained numbers.
        total: all numbers of the model.
        share: trainable / total.
        last_step: the last step that is known of.
        planned_steps: how many steps the run was to take.
    """

    status: str
    before: Measure | None
    after: Measure | None
    change: float | None
    seconds: float | None
    train_seconds: float | None
    tokens_per_second: float | None
    examples_per_second: float | None
    peak_bytes: float | None
    device_bytes: float | None
    trainable: float | None
    total: float | None
    share: float | None
    last_step: int | None
    planned_steps: float | None


def summarize(run: Run) -> Summary:
    """The headline of `run`."""
    ends = [process.end for process in run.processes if process.end is not None]
    before, after = _before(run), _after(run)
    trainable, total = _number(run.resolved.get("trainable")), _number(run.resolved.get("total"))
    share = _number(run.resolved.get("share"))
    rates = [step.tokens_per_second for step in run.steps if step.tokens_per_second is not None]
    counted = [step.examples_per_second for step in run.steps if step.examples_per_second is not None]
    reached = [step.step for step in run.steps] + [end.steps for end in ends[-1:] if end.steps is not None]
    trained = [end.train_seconds for end in ends if end.train_seconds is not None]
    return Summary(
        status="no end" if run.end is None else run.end.status,
        before=before,
        after=after,
        change=_change(before, after),
        seconds=_sum(process.seconds for process in run.processes),
        # A process without an end did not say how long it trained, so the sum would be wrong without it.
        train_seconds=_sum(trained) if len(trained) == len(run.processes) else None,
        tokens_per_second=median(rates) if rates else None,
        examples_per_second=median(counted) if counted else None,
        peak_bytes=_largest([*(step.peak_rss_bytes for step in run.steps), *(end.peak_rss_bytes for end in ends)]),
        device_bytes=_largest(
            [*(step.peak_device_bytes for step in run.steps), *(end.peak_device_bytes for end in ends)]
        ),
        trainable=trainable,
        total=total,
        share=trainable / total if trainable is not None and total else share,
        last_step=max(reached, default=None),
        planned_steps=_number(run.resolved.get("train_steps")),
    )


def _before(run: Run) -> Measure | None:
    ends = [process.end for process in run.processes if process.end is not None]
    told = next((end.eval_loss_before for end in ends if end.eval_loss_before is not None), None)
    measured = run.evaluations[:1] if run.evaluations and run.evaluations[0].step == 0 else ()
    return _measure(told, measured)


def _after(run: Run) -> Measure | None:
    told = None if run.end is None else run.end.eval_loss_after
    measured = [evaluation for evaluation in run.evaluations if evaluation.step > 0]
    return _measure(told, measured)


def _measure(told: float | None, measured: Sequence[Evaluation]) -> Measure | None:
    """The last of `measured` with the loss that the end of the run `told`; where none was told, the last."""
    fitting = [
        one
        for one in measured
        if told is None or (one.loss is not None and math.isclose(one.loss, told, rel_tol=ROUNDED))
    ]
    if fitting:
        one = fitting[-1]
        return Measure(one.step, one.loss, one.perplexity, one.accuracy, one.agreement)
    return None if told is None else Measure(None, told, None, None)


def _change(before: Measure | None, after: Measure | None) -> float | None:
    if before is None or after is None or not before.loss or after.loss is None:
        return None
    return after.loss / before.loss - 1


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _sum(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if known else None


def _largest(numbers: Iterable[float | None]) -> float | None:
    return max((number for number in numbers if number is not None), default=None)
