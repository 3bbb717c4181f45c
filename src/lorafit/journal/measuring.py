"""Losses of held-out records, one for each, as a loop gives them or as a function of batches computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError, TrainingError
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
    if not all(value > 0 for value in many):
        raise ConfigError(
            "a record without a prediction has no loss",
            where="Journal.evaluate: counts",
            found=min(many),
            expected="at least one prediction in every record",
            fix="leave such records out",
        )
    return Measured(each, many, right)


def computed(model: nn.Module, measure: Measure, batches: Iterable[Any]) -> Measured:
    """What a function finds on batches, without gradients and dropout; training goes on with the same random numbers.

    Raises:
        ConfigError: it does not give one loss for each record.
    """
    losses: list[float] = []
    correct: list[float] = []
    with at_rest(model), torch.random.fork_rng(devices=[]):
        for batch in batches:
            found = measure(batch)
            each, right = found if isinstance(found, tuple) else (found, None)
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
