"""What a run learns from its records: text, classes, or numbers. The user says it, or the labels do, aloud."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from lorafit.errors import DataError, some
from lorafit.training.config import Task
from lorafit.training.examples import Example, Labelled

CAUSAL: Final = "causal-lm"
CLASSES: Final = "sequence-classification"
NUMBERS: Final = "regression"
AUTO: Final = "auto"
TWO = 2
"""Whole numbers of which there are no more than so many are classes, and nobody has to be told."""


@final
@dataclass(frozen=True)
class Decided:
    """What is learnt.

    Attributes:
        task: CAUSAL, CLASSES or NUMBERS.
        said: why, in a sentence, where it was guessed and could have been meant otherwise; else empty.
    """

    task: Task
    said: str = ""


def decide(asked: Task, examples: Sequence[Example]) -> Decided:
    """What is learnt from these records, training and held-out ones together.

    Labels that are numbers, some of them with a fraction, are predicted as numbers; whole numbers and names are
    classes, unless the user says otherwise.

    >>> rated = [Labelled("good", None, 3.5, "a:1"), Labelled("bad", None, -2.0, "a:2")]
    >>> decide("auto", rated).task, decide("sequence-classification", rated).task
    ('regression', 'sequence-classification')
    """
    if asked != AUTO:
        return Decided(asked)
    if not isinstance(examples[0], Labelled):
        return Decided(CAUSAL)
    values = [number(one) for one in examples if isinstance(one, Labelled)]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Decided(CLASSES)
    if any(not value.is_integer() for value in known):
        return Decided(NUMBERS, "the labels are numbers with fractions, and are predicted as such (task=regression)")
    if len(set(known)) > TWO:
        said = f"the labels are {len(set(known)):,} whole numbers, taken for classes; task=regression predicts them"
        return Decided(CLASSES, f"{said} as numbers")
    return Decided(CLASSES)


def number(example: Labelled) -> float | None:
    """The number that a label is, also one that a CSV file has as text; None where it is a name or a truth value.

    >>> number(Labelled("good", None, "3.5", "a:1")), number(Labelled("good", None, "fine", "a:2"))
    (3.5, None)
    """
    label = example.label
    if isinstance(label, bool):
        return None
    try:
        value = float(label)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def numbers(examples: Sequence[Labelled]) -> list[float]:
    """The labels as numbers.

    Raises:
        DataError: some are none.
    """
    found = [number(one) for one in examples]
    wrong = [one for one, value in zip(examples, found, strict=True) if value is None]
    if wrong:
        alike = [one.where for one in wrong[1:]]
        first = wrong[0]
        raise DataError(
            "The label is no number.",
            where=f"{first.where} (and {len(alike):,} more like it: {some(alike, 3)})" if alike else first.where,
            found=repr(first.label),
            expected="a finite number, as a regression predicts",
            fix="write a number there, leave the record out, or learn classes: --task classification",
        )
    return [value for value in found if value is not None]
