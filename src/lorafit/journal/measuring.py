"""Losses of held-out records, one for each, as a loop gives them or as a function of batches computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from lorafit.errors import ConfigError, TrainingError
from lorafit.journal.condition import random_apart
from lorafit.rest import at_rest

Numbers = Sequence[float] | Tensor
Measure = Callable[[Any], Tensor | tuple[Tensor, Tensor]]
"""From a batch to the loss of each of its records, or to those and how much of each was right."""


@final
@dataclass(frozen=True)
class Measured:
    """Held-out records as they were measured.

    Attributes:
        losses: the summed loss of each record.
        counts: the predictions of each record.
        correct: how many of them were right; None where that was not said.
    """

    losses: tuple[float, ...]
    counts: tuple[float, ...]
    correct: tuple[float, ...] | None

    @property
    def accuracy(self) -> float | None:
        """The share of predictions that were right."""
        return None if self.correct is None else math.fsum(self.correct) / math.fsum(self.counts)


def check_asked(losses: object, loader: object, correct: object, counts: object) -> None:
    """Raises `ConfigError` for numbers of records beside a function of batches, or for a half of one of these."""
    if loader is None and callable(losses):
        found, fix = "a function alone", "journal.evaluate(function, loader)"
    elif loader is not None and not callable(losses):
        found, fix = f"a {type(losses).__name__} beside a loader", "journal.evaluate(losses)"
    elif loader is not None and (correct is not None or counts is not None):
        found = f"a function with {'correct' if counts is None else 'counts'} beside it"
        fix = "a function that gives (losses, correct); or compute them: journal.evaluate(losses, correct=, counts=)"
    else:
        return
    raise ConfigError(
        "evaluate takes the numbers of records, or a function and the batches that it is called with",
        where="Journal.evaluate",
        found=found,
        expected="evaluate(losses, correct=..., counts=...) or evaluate(function, loader)",
        fix=fix,
    )


def given(losses: Numbers, correct: Numbers | None, counts: Numbers | None) -> Measured:
    """The losses that a loop has computed itself.

    Raises:
        ConfigError: they are not one for each record.
    """
    each = numbers(losses, "losses")
    many = tuple(1.0 for _ in each) if counts is None else numbers(counts, "counts")
    right = None if correct is None else numbers(correct, "correct")
    for name, values in (("counts", many), ("correct", right)):
        if values is not None and len(values) != len(each):
            raise ConfigError(
                f"{name} and losses are not of the same records",
                where="Journal.evaluate",
                found=f"{len(values):,} {name}, {len(each):,} losses",
                expected="one of each for every record",
            )
    odd = [value for value in many if not 0 < value < math.inf]
    if odd:
        raise ConfigError(
            "a record without a prediction has no loss",
            where="Journal.evaluate: counts",
            found=odd[0],
            expected="at least one prediction in every record",
            fix="leave such records out",
        )
    wrong = [(value, of) for value, of in zip(right or (), many, strict=False) if not 0 <= value <= of]
    if wrong:
        raise ConfigError(
            "of a record's predictions no more than all can be right",
            where="Journal.evaluate: correct",
            found=f"{wrong[0][0]:g} of {wrong[0][1]:g}",
            expected="a number from 0 to that of its predictions",
            fix="journal.evaluate(losses, correct=correct, counts=counts), where records have several predictions",
        )
    return Measured(each, many, right)


def computed(model: nn.Module, measure: Measure, batches: Iterable[Any]) -> Measured:
    """What a function finds on batches, without gradients and dropout; training goes on with the same random numbers.

    Raises:
        ConfigError: it does not give one loss for each record.
    """
    losses: list[float] = []
    correct: list[float] = []
    with at_rest(model), random_apart():
        for batch in batches:
            each, right = _parts(measure(batch))
            losses += numbers(each, "losses")
            correct += () if right is None else numbers(right, "correct")
    if correct and len(correct) != len(losses):
        raise ConfigError(
            "correct and losses are not of the same records",
            where="Journal.evaluate",
            found=f"{len(correct):,} correct, {len(losses):,} losses",
            expected="one of each for every record",
        )
    return given(losses, correct or None, None)


def _parts(found: Any) -> tuple[Any, Any]:
    """The losses of a batch, and what was right, if that was said."""
    if not isinstance(found, tuple):
        return found, None
    if len(found) != 2:
        raise ConfigError(
            "the function gives neither losses nor losses and what was right",
            where="Journal.evaluate",
            found=f"a tuple of {len(found)}",
            expected="a tensor (records,), or two of them",
            fix="return losses, correct",
        )
    return found[0], found[1]


def numbers(values: Iterable[Any] | Tensor, what: str) -> tuple[float, ...]:
    """Numbers of records, of a tensor, a sequence or an array.

    Raises:
        ConfigError: they are none, or one for all records together.
    """
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise _not_each(what, f"a tensor of shape {tuple(values.shape)}")
        values = values.detach().cpu().double().tolist()
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise _not_each(what, f"a {type(values).__name__}") from None
    if not found:
        raise _not_each(what, "none")
    return found


def check_finite(found: Measured, step: int) -> None:
    """Raises `TrainingError` for a held-out loss that is no number any more."""
    bad = [place for place, value in enumerate(found.losses) if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            "the held-out loss is not finite",
            where=f"step {step}",
            found=f"{len(bad):,} of {len(found.losses):,} records, the first at place {bad[0]}",
            expected="a finite loss of every record",
            fix="lower the learning rate; in float16, use bfloat16 instead",
        )


def _not_each(what: str, found: str) -> ConfigError:
    return ConfigError(
        f"{what} must be one number for each record: a verdict needs their spread",
        where="Journal.evaluate",
        found=found,
        expected="a tensor (records,) or a list of numbers",
        fix='reduction="none" of torch\'s losses, and the mean over what is not records: loss.flatten(1).mean(1)',
    )
