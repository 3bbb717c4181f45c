"""What became of records that a run measures and does not learn from: of a general text, and of another domain.

Changes are those of the same records, so that hard records drop out of them; a gap is that of different records, and
each side has its own error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from lorafit.training.findings import Compared, Forgetting, Gap, Moved, Shift, finite
from lorafit.training.verdict import WORTH, Change, Evaluation, change

LARGE = 0.1
"""Nats per token from which on forgetting has hints: the perplexity is a tenth higher then."""


@final
@dataclass(frozen=True)
class Reading:
    """Records at one time.

    Attributes:
        losses: of each.
        correct: how many of its predictions were right; None where that is not counted.
    """

    losses: Evaluation
    correct: tuple[float, ...] | None = None

    def right(self) -> Evaluation | None:
        """The shares of right predictions, as an evaluation has losses."""
        return None if self.correct is None else Evaluation(self.losses.step, self.correct, self.losses.counts)


@final
@dataclass(frozen=True)
class Doing:
    """What a run did to come to its adapter, for hints: steps, their learning rate, and the rank if it has one."""

    steps: int
    rate: float
    r: int | None = None
    gained: Moved | None = None

    def told(self) -> str:
        """In a few words."""
        rank = "" if self.r is None else f", r {self.r}"
        return f"{self.steps:,} steps at a learning rate of {self.rate:.2g}{rank}"


def forgetting(text: str, before: Evaluation, after: Evaluation, doing: Doing) -> Forgetting:
    """What became of a general text."""
    loss = Moved.of(before, after)
    told = f"{text} {loss.before:.3f} → {loss.after:.3f} nats/token ({loss.changed()})"
    if not loss.rose:
        return Forgetting(text, loss, f"no measurable forgetting: {told}", ())
    if loss.change < WORTH * loss.before:
        return Forgetting(text, loss, f"hardly any forgetting: {told}", ())
    if loss.change < LARGE:
        return Forgetting(text, loss, f"forgot: {told}", ())
    gained = "" if doing.gained is None else f", for {-doing.gained.change:.3f} on the held-out records"
    hint = (
        f"the general text's perplexity went from {_perplexity(loss.before)} to {_perplexity(loss.after)} in "
        f"{doing.told()}{gained}: a lower rate, fewer steps or a lower r forget less, and so does a run with some "
        "general records mixed into its data"
    )
    return Forgetting(text, loss, f"forgot: {told}", (hint,))


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.4g}"


def shifted(
    source: str,
    target: str,
    held: tuple[Reading, Reading] | None,
    there: tuple[Reading, Reading],
    accuracy: tuple[float, float] | None,
    unit: str,
) -> Shift:
    """What became of the target, and whether what was learnt on the source carries over.

    Args:
        source: the name of the data.
        target: that of the other domain's.
        held: held-out records of the source before and after, where there are any.
        there: those of the target.
        accuracy: that on the source before and after, of a classifier.
        unit: of the loss.
    """
    loss = _compare(None if held is None else (held[0].losses, held[1].losses), (there[0].losses, there[1].losses))
    right = there[0].right(), there[1].right()
    shares = None
    if right[0] is not None and right[1] is not None:
        shares = _accuracies(accuracy, None if held is None else len(held[1].losses.counts), (right[0], right[1]))
    sentence = _carried(source, target, loss, unit, None if shares is None else shares.on_target)
    if shares is not None:
        sentence += f"; accuracy on {target} {shares.on_target.before:.1%} → {shares.on_target.after:.1%}"
        if shares.on_source is not None:
            sentence += f", on {source} {shares.on_source.before:.1%} → {shares.on_source.after:.1%}"
    hints: tuple[str, ...] = ()
    if not loss.on_target.fell or (loss.gap is not None and _above(loss.gap.change, loss.gap.change_margin)):
        hints = (
            f"for {target}, mix records like its own into the training data; a lower learning rate, fewer steps or a "
            "lower r stay nearer to the base model",
        )
    return Shift(source, target, loss, shares, sentence, hints if loss.on_target.margin is not None else ())


def _carried(source: str, target: str, loss: Compared, unit: str, right: Moved | None) -> str:
    there, here = loss.on_target, loss.on_source
    moved = f"{target} {there.told()} {unit}"
    beside = ""
    if here is not None:
        share = f"{there.change / here.change:.0%} as much as on" if here.fell and there.fell else "and"
        beside = f", {share} held-out records of {source}, {here.told()}"
    if right is not None and right.rose and not there.fell:
        word = "what was learnt carries over in part: more answers are right, and the wrong ones are given too surely"
    elif right is not None and right.fell and there.fell:
        word = "what was learnt carries over in part: fewer answers are right, and the wrong ones are less sure"
    elif there.fell:
        word = "what was learnt carries over" if here is None or here.fell else f"better on {target}"
    elif there.rose:
        word = "what was learnt does not carry over, it does harm"
    else:
        word = "what was learnt does not measurably carry over"
    gap = loss.gap
    between = ""
    if gap is not None:
        between = (
            f"; gap {_with(gap.before, gap.before_margin)} → {_with(gap.after, gap.after_margin)} "
            f"({gap.change:+.3f}{_within(gap.change_margin)})"
        )
    return f"{word}: {moved}{beside}{between}"


def _with(value: float, margin: float | None) -> str:
    return f"{value:.3f}{_within(margin)}"


def _within(margin: float | None) -> str:
    return "" if margin is None else f" ± {margin:.3f}"


def _above(value: float, margin: float | None) -> bool:
    return margin is not None and value - margin > 0


def _compare(held: tuple[Evaluation, Evaluation] | None, there: tuple[Evaluation, Evaluation]) -> Compared:
    if held is None:
        return Compared(None, Moved.of(*there), None)
    changes = change(*there), change(*held)
    before, after = (_apart(_level(each), _level(other)) for each, other in zip(there, held, strict=True))
    return Compared(Moved.of(*held), Moved.of(*there), _gap(before, after, _apart(*changes)))


def _accuracies(
    here: tuple[float, float] | None, records: int | None, there: tuple[Evaluation, Evaluation]
) -> Compared:
    if here is None or records is None:
        return Compared(None, Moved.of(*there), None)
    # The error of a share follows from the share; that of its change would take each record's own answers.
    free = records - 1
    levels = [Change(one, math.sqrt(one * (1 - one) / free) if free else math.inf, free) for one in here]
    before, after = (_apart(_level(each), level) for each, level in zip(there, levels, strict=True))
    moved = Moved(records, here[0], here[1], here[1] - here[0], None)
    return Compared(moved, Moved.of(*there), _gap(before, after, Change(after.value - before.value, math.inf)))


def _level(one: Evaluation) -> Change:
    """A mean with its error: its change from nothing."""
    return change(Evaluation(one.step, (0.0,) * len(one.losses), one.counts), one)


def _apart(one: Change, other: Change) -> Change:
    """The difference of two values of different records, whose errors say as much of it as they are large (Welch)."""
    error = math.hypot(one.error, other.error)
    if error == 0 or math.isinf(error):
        return Change(one.value - other.value, error, min(one.degrees, other.degrees))
    parts = [(each.error / error) ** 4 / each.degrees for each in (one, other) if each.error]
    return Change(one.value - other.value, error, 1 / math.fsum(parts) if math.fsum(parts) else math.inf)


def _gap(before: Change, after: Change, moved: Change) -> Gap:
    margins = [finite(each.margin) for each in (before, after, moved)]
    return Gap(before.value, margins[0], after.value, margins[1], after.value - before.value, margins[2])
