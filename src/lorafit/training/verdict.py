"""Whether a run is still learning, has learnt what it can, or overfits: told from held-out losses and their noise.

Each evaluation has a loss for every held-out record. Two evaluations are compared record by record: that a record is
hard drops out of the difference, so that a change far smaller than the spread of the losses can be told from chance.
The standard error is that of a ratio estimator with records as the units that were drawn (Cochran 1977, Sampling
Techniques, eq. 2.46): for the mean over tokens, records of many tokens weigh more. It is itself a guess from as many
records as there are, and so what is probable is told by Student's t.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

from lorafit.training.student import below, quantile

ERROR = 0.05
"""The probability with which a change is said to be one that is none, over all comparisons of a run.

Over all looks, too, of a run that is looked at after every evaluation, to end it once it overfits.
"""
LATE = 2 / 3
"""The share of a run after which it has to have improved to be improving."""
WORTH = 0.005
"""The share of the loss by which it has to have improved."""
STILL = 0.02
"""The share of the loss within which it has to have stayed, as far as can be told, to have converged."""
APART = 0.15
"""The share of the held-out loss by which the training loss has to be lower to be called far below it."""


class Kind(enum.Enum):
    """What can be said of a run."""

    IMPROVING = "still improving"
    CONVERGED = "converged"
    OVERFITTING = "overfitting"
    UNCHANGED = "not learning"
    UNDECIDED = "undecided"


@final
@dataclass(frozen=True)
class Evaluation:
    """The held-out records at one step.

    Attributes:
        step: optimizer steps so far.
        losses: the summed loss of each record, in nats.
        counts: the predictions of each record.
    """

    step: int
    losses: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, step: int, losses: Sequence[float], counts: Sequence[float]) -> Evaluation:
        """With losses as the records of a run hold them: rounded, so that a run that goes on judges alike."""
        return cls(step, tuple(float(f"{each:.7g}") for each in losses), tuple(counts))

    @cached_property
    def mean(self) -> float:
        """The loss of one prediction."""
        return math.fsum(self.losses) / math.fsum(self.counts)


@final
@dataclass(frozen=True)
class Change:
    """A difference of two means, and its standard error.

    Attributes:
        value: the difference.
        error: its standard error.
        degrees: of freedom of the error, one less than the records that it was taken from; infinite where it is known.
    """

    value: float
    error: float
    degrees: float = math.inf

    def probability(self) -> float:
        """How probable a difference as low as this one, or lower, is where there is none."""
        if self.error == 0:
            return 0.5 if self.value == 0 else float(self.value > 0)
        return 0.5 if math.isinf(self.error) else below(self.value / self.error, self.degrees)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        return self.error if math.isinf(self.error) else quantile(0.975, self.degrees) * self.error


def change(before: Evaluation, after: Evaluation) -> Change:
    """The change of the mean loss from one evaluation to another one of the same records.

    >>> flat = Evaluation(0, (2.0, 4.0, 6.0), (1.0, 2.0, 3.0))
    >>> change(flat, Evaluation(9, (1.5, 3.0, 4.5), (1.0, 2.0, 3.0)))
    Change(value=-0.5, error=0.0, degrees=2)
    """
    total, records = math.fsum(after.counts), len(after.counts)
    moved = [new - old for new, old in zip(after.losses, before.losses, strict=True)]
    value = math.fsum(moved) / total
    if records < 2:
        return Change(value, math.inf, 0)
    rest = math.fsum((each - value * count) ** 2 for each, count in zip(moved, after.counts, strict=True))
    return Change(value, math.sqrt(rest * records / (records - 1)) / total, records - 1)


@final
@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Attributes:
        kind: in a word.
        best: the step with the lowest held-out loss.
        sentence: the same with its numbers, for people.
        hints: what to do about it, each with the numbers that led to it.
    """

    kind: Kind
    best: int
    sentence: str
    hints: tuple[str, ...]


@final
@dataclass(frozen=True)
class Ways:
    """What hints call the ways to change a run.

    Attributes:
        stop: to stop early.
        longer: to train for longer.
        often: to measure more often.
        look: to look at the data.
        hold: to measure on more.
    """

    stop: str = "early_stopping"
    longer: str = "num_train_epochs or max_steps"
    often: str = "eval_steps"
    look: str = "look at the data: lorafit check"
    hold: str = "hold out more records"


SETTINGS = Ways()
"""The settings of `lorafit train`."""


class Stage(enum.Enum):
    """Where a run stands that is judged before its end."""

    GOING = "it goes on"


GOING: Final = Stage.GOING


def judge(
    evaluations: Sequence[Evaluation], trained: float | Stage | None = GOING, *, ways: Ways = SETTINGS
) -> Verdict | None:
    """The verdict on a run; None where it was never evaluated.

    Args:
        evaluations: of the same records, in the order of their steps; the first may be of step 0.
        trained: the mean training loss of the last steps of a run that has ended, None if it is not known. Left out of
            a run that goes on and is looked at after every evaluation: it is then said to overfit only where all these
            looks together hardly say so by chance.
        ways: what hints call the ways to change the run.
    """
    if not evaluations:
        return None
    best, last = min(evaluations, key=lambda one: one.mean), evaluations[-1]
    told = None if isinstance(trained, Stage) else trained
    found = _overfitting(best, last, told, ways, _allowed(evaluations, looking=isinstance(trained, Stage)))
    return found or _unchanged(evaluations, best, last, ways) or _late(evaluations, best, last, told, ways)


def _allowed(evaluations: Sequence[Evaluation], *, looking: bool) -> float:
    """The probability at which the last loss counts as risen over the lowest of those before it.

    The lowest of many is low by luck: what is allowed is divided among them. Of the looks at a run that goes on, the
    k-th gets the share 1 / (k (k + 1)), which comes to 1 over however many there are.
    """
    before = sum(one.step > 0 for one in evaluations[:-1])
    if not looking:
        return ERROR / max(1, len(evaluations) - 1)
    return ERROR / max(1, before * before * (before + 1))


def _overfitting(
    best: Evaluation, last: Evaluation, trained: float | None, ways: Ways, allowed: float
) -> Verdict | None:
    """The loss rose since the best step, by more than chance would have it for the best of so many."""
    if best is last or best.step == 0:
        return None
    rise = change(best, last)
    if 1 - rise.probability() >= allowed:
        return None
    sentence = (
        f"overfitting since step {best.step:,}: the held-out loss rose from {best.mean:.4f} to {last.mean:.4f} "
        f"({_signed(rise)})"
    )
    hints = [f"stop at step {best.step:,} ({ways.stop}), train on more data, or lower r or the learning rate"]
    if trained is not None:
        hints.insert(0, f"the training loss is {trained:.3f}, {_below(trained, last.mean)} the held-out one")
    return Verdict(Kind.OVERFITTING, best.step, sentence, tuple(hints))


def _unchanged(evaluations: Sequence[Evaluation], best: Evaluation, last: Evaluation, ways: Ways) -> Verdict | None:
    """The loss is not lower than before the first step."""
    first = evaluations[0]
    if first.step != 0 or last is first:
        return None
    learnt = change(first, last)
    if learnt.probability() < ERROR:
        return None
    sentence = f"not learning: the held-out loss is {last.mean:.4f}, and was {first.mean:.4f} ({_signed(learnt)})"
    hint = f"raise the learning rate (3 times as high is a fair try) or r, and {ways.look}"
    if learnt.value - learnt.margin > 0:
        hint = f"lower the learning rate (to a third is a fair try), and {ways.look}"
    return Verdict(Kind.UNCHANGED, best.step, sentence, (hint,))


def _late(
    evaluations: Sequence[Evaluation], best: Evaluation, last: Evaluation, trained: float | None, ways: Ways
) -> Verdict:
    """What happened in the last part of the run."""
    before = [one for one in evaluations[:-1] if one.step > 0]
    earlier = [one for one in before if one.step <= max(1, LATE * last.step)] or before
    if not earlier:
        sentence = f"undecided: the held-out loss is {last.mean:.4f}, and was measured once in training"
        return Verdict(Kind.UNDECIDED, best.step, sentence, (f"measure more often: {ways.often}",))
    since, late = earlier[-1], change(earlier[-1], last)
    told = f"from {since.mean:.4f} at step {since.step:,} to {last.mean:.4f} ({_signed(late)})"
    if late.probability() < ERROR and -late.value >= WORTH * since.mean:
        hints = [f"train for longer ({ways.longer}): the run ended before the learning did"]
        return Verdict(Kind.IMPROVING, best.step, f"still improving: the held-out loss went {told}", tuple(hints))
    if abs(late.value) + late.margin <= STILL * since.mean:
        return Verdict(Kind.CONVERGED, best.step, f"converged: the held-out loss went {told}", _after(last, trained))
    sentence = f"undecided: the held-out loss went {told}, which is too little to tell from chance"
    if not math.isfinite(late.margin):
        return Verdict(Kind.UNDECIDED, best.step, sentence, ("hold out more than one record",))
    needed = math.ceil(len(last.counts) * (late.margin / (STILL * since.mean)) ** 2)
    hint = f"{ways.hold}: about {needed:,} instead of {len(last.counts):,} would tell a change of {STILL:.0%}"
    return Verdict(Kind.UNDECIDED, best.step, sentence, (hint,))


def _after(last: Evaluation, trained: float | None) -> tuple[str, ...]:
    """What may lower the loss of a run that has converged."""
    if trained is None:
        return ()
    if trained < (1 - APART) * last.mean:
        return (
            f"the training loss is {trained:.3f}, {_below(trained, last.mean)} the held-out one: more data or a lower "
            "r would close the gap",
        )
    return (
        f"the training loss is {trained:.3f}, near the held-out one: a higher r or learning rate may fit the data "
        "better",
    )


def _below(trained: float, held: float) -> str:
    """Where the training loss lies beside the held-out one.

    >>> _below(0.5, 1.0), _below(3.0, 2.0)
    ('50% below', '50% above')
    """
    share = 1 - trained / held
    return f"{abs(share):.0%} {'below' if share >= 0 else 'above'}"


def _signed(found: Change) -> str:
    """A change with the half-width of its 95 % interval.

    >>> _signed(Change(-0.05, 0.01)), _signed(Change(-0.05, 0.01, degrees=4))
    ('-0.0500 ± 0.0196', '-0.0500 ± 0.0278')
    """
    return f"{found.value:+.4f} ± {found.margin:.4f}"
